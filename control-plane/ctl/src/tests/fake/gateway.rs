//! The gateway's side of the fake.

use super::{Chunks, Fake};
use penstock_proto::v1::{inference_server::Inference, *};
use tonic::{Request, Response, Status};

#[tonic::async_trait]
impl Inference for Fake {
    type GenerateStream = Chunks;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Chunks>, Status> {
        let metadata = request.metadata().clone();
        let get = |name: &str| metadata.get(name).map_or("", |value| value.to_str().unwrap());
        let body = request.get_ref();
        let input = match body.input.as_ref().unwrap() {
            generate_request::Input::Prompt(prompt) => format!("prompt={prompt}"),
            generate_request::Input::Chat(chat) => {
                format!("chat={}:{}", chat.messages[0].role, chat.messages[0].content)
            }
            generate_request::Input::InputIds(_) => "ids".to_owned(),
        };
        let sampling = body.sampling.clone().unwrap_or_default();
        let number = |value: Option<u64>| value.map_or_else(|| "None".to_owned(), |value| value.to_string());
        self.state().last_generate = Some(format!(
            "{input} user={} pin={} region={} seed={} max={} temperature={:?}",
            get("x-user-id"),
            get("x-model-version"),
            get("x-region"),
            number(sampling.seed),
            number(sampling.max_tokens.map(u64::from)),
            sampling.temperature,
        ));
        let mut last = GenerateResponse {
            text: " world".into(),
            ..GenerateResponse::default()
        };
        last.set_finish_reason(FinishReason::Length);
        last.usage = Some(Usage {
            prompt_tokens: 3,
            completion_tokens: 2,
            cached_tokens: 1,
        });
        let first = GenerateResponse {
            text: "Hello".into(),
            ..GenerateResponse::default()
        };
        let mut response: Response<Chunks> =
            Response::new(Box::pin(tokio_stream::iter([Ok(first), Ok(last)])));
        for (name, value) in [
            ("x-model-version", "v2"),
            ("x-rollout-epoch", "8"),
            ("x-assignment-reason", "pin"),
            ("x-seed", "3"),
            ("x-reply-id", "r-7"),
        ] {
            response.metadata_mut().insert(name, value.parse().unwrap());
        }
        Ok(response)
    }

    async fn tokenize(&self, _: Request<TokenizeRequest>) -> Result<Response<TokenizeResponse>, Status> {
        Err(Status::unimplemented("not asked for here"))
    }

    async fn score(&self, _: Request<ScoreRequest>) -> Result<Response<ScoreResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn list_models(
        &self,
        _: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        Err(Status::unimplemented("not asked for here"))
    }

    async fn feedback(
        &self,
        request: Request<FeedbackRequest>,
    ) -> Result<Response<FeedbackResponse>, Status> {
        let request = request.into_inner();
        if request.reply_id == "r-0" {
            return Err(Status::not_found("no reply r-0 is remembered"));
        }
        self.state().last_feedback = Some(request);
        Ok(Response::new(FeedbackResponse {
            model: "demo".into(),
            revision: "v2".into(),
        }))
    }
}
