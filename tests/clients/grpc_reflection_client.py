"""A grpcio client that learns the service from reflection: argument 1 is the gateway's host:port."""
import sys

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

channel = grpc.insecure_channel(sys.argv[1])
database = ProtoReflectionDescriptorDatabase(channel)
assert "penstock.v1.Inference" in database.get_services(), database.get_services()
pool = DescriptorPool(database)
method = pool.FindServiceByName("penstock.v1.Inference").FindMethodByName("Generate")
Request = message_factory.GetMessageClass(method.input_type)
Response = message_factory.GetMessageClass(method.output_type)
generate = channel.unary_stream(
    "/penstock.v1.Inference/Generate",
    request_serializer=Request.SerializeToString,
    response_deserializer=Response.FromString)

request = Request(model="demo")
request.chat.messages.add(role="user", content="地球的周长是多少?")
request.sampling.temperature = 0
call = generate(request, metadata=[("x-user-id", "ada")], timeout=30)
chunks = list(call)
text = "".join(c.text for c in chunks)
assert "40,075" in text or "40075" in text, text
assert [c.text_offset for c in chunks] == [
    len("".join(c.text for c in chunks[:i]).encode()) for i in range(len(chunks))], chunks
assert chunks[-1].usage.completion_tokens == sum(len(c.token_ids) for c in chunks), chunks[-1]
metadata = dict(call.initial_metadata())
assert metadata["x-model-version"] in ("v1", "v2") and int(metadata["x-rollout-epoch"]) > 0, metadata
assert metadata["x-assignment-reason"], metadata
assert "penstock-stats-bin" in dict(call.trailing_metadata()), call.trailing_metadata()

for wrong, code in [
        (Request(model="nothing", prompt="x"), grpc.StatusCode.NOT_FOUND),
        (Request(model="demo"), grpc.StatusCode.INVALID_ARGUMENT),
        (Request(model="demo", prompt="x", sampling=dict(top_p=2)), grpc.StatusCode.INVALID_ARGUMENT)]:
    try:
        list(generate(wrong, timeout=30))
    except grpc.RpcError as error:
        assert error.code() == code, (wrong, error)
    else:
        raise AssertionError(f"{wrong} was accepted")
print("ok")
