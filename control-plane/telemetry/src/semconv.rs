//! Every name of a span, metric or attribute, in one place.
//!
//! Names from OpenTelemetry's GenAI conventions (status: Development) where they exist, else `penstock.*`.

/// Attributes.
pub mod attribute {
    /// What is done: [`GENERATE`](super::value::GENERATE).
    pub const OPERATION_NAME: &str = "gen_ai.operation.name";
    /// Who serves: [`PENSTOCK`](super::value::PENSTOCK).
    pub const PROVIDER_NAME: &str = "gen_ai.provider.name";
    /// Model asked for.
    pub const REQUEST_MODEL: &str = "gen_ai.request.model";
    /// Tokens the client wants at most.
    pub const REQUEST_MAX_TOKENS: &str = "gen_ai.request.max_tokens";
    /// Sampling temperature.
    pub const REQUEST_TEMPERATURE: &str = "gen_ai.request.temperature";
    /// Nucleus mass.
    pub const REQUEST_TOP_P: &str = "gen_ai.request.top_p";
    /// Likeliest tokens kept.
    pub const REQUEST_TOP_K: &str = "gen_ai.request.top_k";
    /// Seed.
    pub const REQUEST_SEED: &str = "gen_ai.request.seed";
    /// Model that answered, `model@revision`.
    pub const RESPONSE_MODEL: &str = "gen_ai.response.model";
    /// Why the reply ended; a list.
    pub const RESPONSE_FINISH_REASONS: &str = "gen_ai.response.finish_reasons";
    /// Tokens of the prompt.
    pub const INPUT_TOKENS: &str = "gen_ai.usage.input_tokens";
    /// Tokens of the reply.
    pub const OUTPUT_TOKENS: &str = "gen_ai.usage.output_tokens";
    /// Tokens of the prompt found in the prefix cache.
    pub const CACHE_READ_TOKENS: &str = "gen_ai.usage.cache_read.input_tokens";
    /// Kind of a counted token: input, cached or output.
    pub const TOKEN_TYPE: &str = "gen_ai.token.type";
    /// Class of an error, e.g. the gRPC status.
    pub const ERROR_TYPE: &str = "error.type";
    /// gRPC status code of a call, as its number.
    pub const GRPC_STATUS: &str = "rpc.grpc.status_code";
    /// Model.
    pub const MODEL: &str = "penstock.model";
    /// Revision of the model.
    pub const REVISION: &str = "penstock.revision";
    /// Epoch of the snapshot that assigned the request.
    pub const EPOCH: &str = "penstock.rollout.epoch";
    /// Why the request was assigned to its revision.
    pub const ASSIGNMENT_REASON: &str = "penstock.assignment.reason";
    /// Priority of the match rule that decided.
    pub const ASSIGNMENT_RULE: &str = "penstock.assignment.rule";
    /// Worker that served.
    pub const ENDPOINT: &str = "penstock.endpoint";
    /// Worker that was lost in the middle of a reply.
    pub const LOST_ENDPOINT: &str = "penstock.endpoint.lost";
    /// Process role: gateway, worker, control-plane or ctl. The all-in-one is several.
    pub const COMPONENT: &str = "penstock.component";
    /// How a request ended: `ok` or the status in lower case.
    pub const OUTCOME: &str = "penstock.outcome";
    /// Why a sequence ended: stop, length, abort or error.
    pub const FINISH_REASON: &str = "penstock.finish_reason";
    /// Uid of a rollout.
    pub const ROLLOUT_UID: &str = "penstock.rollout.uid";
    /// Generation of a rollout's plan.
    pub const GENERATION: &str = "penstock.rollout.generation";
    /// The canary's share in parts per million.
    pub const CANARY_PPM: &str = "penstock.rollout.canary_ppm";
    /// Name of a gateway.
    pub const GATEWAY: &str = "penstock.gateway";
    /// What was asked of the control plane, or why a gateway refused a snapshot.
    pub const CODE: &str = "penstock.code";
    /// Admin operation.
    pub const OPERATION: &str = "penstock.operation";
}

/// Values of attributes.
pub mod value {
    /// Operation name of Generate.
    pub const GENERATE: &str = "generate";
    /// Provider name.
    pub const PENSTOCK: &str = "penstock";
    /// Token type of the prompt.
    pub const INPUT: &str = "input";
    /// Token type of the part of the prompt that was found in the cache.
    pub const CACHED: &str = "cached";
    /// Token type of the reply.
    pub const OUTPUT: &str = "output";
    /// Outcome of a request that ended well.
    pub const OK: &str = "ok";
    /// Component: gateway.
    pub const GATEWAY: &str = "gateway";
    /// Component: worker.
    pub const WORKER: &str = "worker";
    /// Component: control plane.
    pub const CONTROL_PLANE: &str = "control-plane";
    /// Component: ctl.
    pub const CTL: &str = "ctl";
}

/// Names of spans. A request's span is named [`generate`](span::generate) on gateway and worker.
pub mod span {
    /// From admission to the first step.
    pub const QUEUE: &str = "queue";
    /// From the first step to the first token.
    pub const PREFILL: &str = "prefill";
    /// From the first token to the last.
    pub const DECODE: &str = "decode";
    /// A compare-and-swap in the store.
    pub const STORE_COMMIT: &str = "store.commit";
    /// Event: another worker goes on with a reply.
    pub const RESUMED: &str = "resumed";
    /// A gateway swaps a snapshot in.
    pub const SNAPSHOT_APPLY: &str = "snapshot.apply";

    /// Name of a request's span: `generate {model}`.
    pub fn generate(model: &str) -> String {
        format!("{} {model}", super::value::GENERATE)
    }
}

/// Names of metrics.
pub mod metric {
    /// Histogram, seconds: whole request.
    pub const REQUEST_DURATION: &str = "gen_ai.server.request.duration";
    /// Histogram, seconds: arrival to first token.
    pub const TIME_TO_FIRST_TOKEN: &str = "gen_ai.server.time_to_first_token";
    /// Histogram, seconds: mean time per token after the first.
    pub const TIME_PER_OUTPUT_TOKEN: &str = "gen_ai.server.time_per_output_token";
    /// Counter: requests by model, revision and outcome.
    pub const REQUESTS: &str = "penstock.requests";
    /// Counter: tokens by model, revision and type.
    pub const TOKENS: &str = "penstock.tokens";
    /// Up-down counter: requests under way.
    pub const INFLIGHT: &str = "penstock.inflight";
    /// Histogram, seconds: admission to first step.
    pub const QUEUE_TIME: &str = "penstock.queue.duration";
    /// Counter: sequences by reason of their end.
    pub const FINISHED: &str = "penstock.finished";
    /// Counter: requests sent to another endpoint after a failure before the first token.
    pub const RETRIES: &str = "penstock.gateway.retries";
    /// Replies that went on at another endpoint.
    pub const RESUMES: &str = "penstock.gateway.resumes";
    /// Counter: requests sent to a second endpoint because the first took long to begin.
    pub const HEDGES: &str = "penstock.gateway.hedges";
    /// Gauge: epoch of the snapshot applied.
    pub const APPLIED_EPOCH: &str = "penstock.gateway.epoch";
    /// Gauge: endpoints known.
    pub const ENDPOINTS: &str = "penstock.gateway.endpoints";
    /// Gauge: 1 while the stream to the control plane is up.
    pub const CONNECTED: &str = "penstock.gateway.connected";
    /// Counter: snapshots refused, by code.
    pub const SNAPSHOT_NACKS: &str = "penstock.gateway.nacks";
    /// Gauge: sequences running.
    pub const ENGINE_RUNNING: &str = "penstock.engine.running";
    /// Gauge: sequences waiting.
    pub const ENGINE_WAITING: &str = "penstock.engine.waiting";
    /// Gauge: KV pages.
    pub const KV_PAGES_TOTAL: &str = "penstock.kv.pages.total";
    /// Gauge: KV pages that hold nothing.
    pub const KV_PAGES_FREE: &str = "penstock.kv.pages.free";
    /// Gauge: KV pages that hold a prefix nobody uses now.
    pub const KV_PAGES_CACHED: &str = "penstock.kv.pages.cached";
    /// Counter: prompt tokens looked up in the prefix cache.
    pub const PREFIX_LOOKUP_TOKENS: &str = "penstock.prefix.lookup_tokens";
    /// Counter: prompt tokens found in the prefix cache.
    pub const PREFIX_HIT_TOKENS: &str = "penstock.prefix.hit_tokens";
    /// Counter: steps of the engine.
    pub const ENGINE_STEPS: &str = "penstock.engine.steps";
    /// Counter: tokens sampled.
    pub const ENGINE_TOKENS: &str = "penstock.engine.tokens";
    /// Counter: sequences put back because KV ran out.
    pub const ENGINE_RETRACTIONS: &str = "penstock.engine.retractions";
    /// Gauge: epoch published.
    pub const PUBLISHED_EPOCH: &str = "penstock.rollout.epoch";
    /// Gauge: the canary's share, 0 to 1, by model.
    pub const CANARY_SHARE: &str = "penstock.rollout.canary_share";
    /// Gauge: gateways that said something within 15 s.
    pub const GATEWAYS_LIVE: &str = "penstock.gateways.live";
    /// Gauge: live gateways that acknowledged the published epoch.
    pub const GATEWAYS_ACKNOWLEDGED: &str = "penstock.gateways.acknowledged";
    /// Gauge: workers registered.
    pub const WORKERS: &str = "penstock.workers";
    /// Histogram, seconds: push to one gateway's acknowledgement.
    pub const PUSH_DURATION: &str = "penstock.push.duration";
    /// Histogram, seconds: commit to the acknowledgement of the last live gateway.
    pub const CONVERGENCE_DURATION: &str = "penstock.convergence.duration";
    /// Counter: snapshots refused by gateways, by code.
    pub const PUSH_NACKS: &str = "penstock.push.nacks";
    /// Counter: admin calls by operation and outcome.
    pub const ADMIN_CALLS: &str = "penstock.admin.calls";
    /// Gauge: 1 on the leader.
    pub const LEADER: &str = "penstock.leader";
}

/// Boundaries of histograms, in seconds.
pub mod bucket {
    /// GenAI conventions, `gen_ai.server.request.duration`: 0.01 doubling to 81.92.
    pub const REQUEST_DURATION: [f64; 14] = [
        0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
    ];
    /// GenAI conventions, `gen_ai.server.time_to_first_token`.
    pub const TIME_TO_FIRST_TOKEN: [f64; 16] = [
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    ];
    /// GenAI conventions, `gen_ai.server.time_per_output_token`.
    pub const TIME_PER_OUTPUT_TOKEN: [f64; 13] = [
        0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    ];
    /// A push within a data centre takes milliseconds, one that a gateway's absence holds up takes seconds.
    pub const PUSH_DURATION: [f64; 13] = [
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0,
    ];
}
