//! Prometheus as one more source of metrics: a query that gives one number, asked again and again while the canary
//! has traffic.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use penstock_plan::{Metric, Rollout, Signal, judge};
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use crate::{leader::Leadership, observed::Observed, world::World};

/// How often it is looked for queries that are due.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Longest that a query may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Why a query gave no number.
#[derive(Debug, thiserror::Error)]
enum QueryError {
    #[error("Prometheus cannot be asked")]
    Http(#[from] reqwest::Error),
    #[error("Prometheus refused the query: {0}")]
    Refused(String),
    #[error("the query gives {0} series; it must give one number")]
    Series(usize),
    #[error("{0:?} is not a number")]
    Value(String),
}

/// The part of an answer that matters here.
#[derive(Debug, Deserialize)]
struct Answer {
    #[serde(default)]
    error: String,
    data: Option<Data>,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "resultType", content = "result", rename_all = "lowercase")]
enum Data {
    Scalar((f64, String)),
    Vector(Vec<Sample>),
    #[serde(other)]
    Other,
}

#[derive(Debug, Deserialize)]
struct Sample {
    value: (f64, String),
}

/// Asks the queries of every rollout whose canary has traffic, while this control plane leads, until `stop`.
pub(crate) async fn run(
    world: Arc<World>,
    observed: Arc<Observed>,
    leadership: Leadership,
    stop: CancellationToken,
) {
    let client = match reqwest::Client::builder().timeout(TIMEOUT).build() {
        Ok(client) => client,
        Err(error) => return tracing::error!(%error, "Prometheus will not be asked"),
    };
    let mut asked: BTreeMap<(String, String), Instant> = BTreeMap::new();
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = stop.cancelled() => return,
        }
        if leadership.borrow().is_none() {
            continue;
        }
        let rollouts: Vec<Rollout> = {
            let state = world.state();
            state
                .rollouts
                .values()
                .map(|stored| stored.value.clone())
                .collect()
        };
        for (rollout, metric) in rollouts
            .iter()
            .filter(|rollout| rollout.routes_canary())
            .flat_map(queries)
        {
            let id = (rollout.uid.clone(), metric.name.to_string());
            let every = metric
                .prometheus
                .as_ref()
                .map_or(TIMEOUT, |query| query.every.get());
            if asked.get(&id).is_some_and(|at| at.elapsed() < every) {
                continue;
            }
            asked.insert(id, Instant::now());
            evaluate(&client, &observed, rollout, metric).await;
        }
        asked.retain(|(uid, _), _| rollouts.iter().any(|rollout| rollout.uid == *uid));
    }
}

fn queries(rollout: &Rollout) -> impl Iterator<Item = (&Rollout, &Metric)> {
    let metrics = rollout.plan.analysis.metrics.iter();
    metrics
        .filter(|metric| matches!(metric.name, Signal::Prometheus(_)))
        .map(move |metric| (rollout, metric))
}

async fn evaluate(client: &reqwest::Client, observed: &Observed, rollout: &Rollout, metric: &Metric) {
    let Some(query) = &metric.prometheus else { return };
    let expression = fill(&query.query, rollout);
    let value = match ask(client, &query.url, &expression).await {
        Ok(value) => value,
        Err(error) => {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(metric = %metric.name, error, "a query gave no number");
            None
        }
    };
    let limit = metric.max.map_or(f64::MAX, judge::number);
    observed.sample(&rollout.uid, &metric.name.to_string(), value, limit);
}

/// The query with the names of the rollout in it.
fn fill(query: &str, rollout: &Rollout) -> String {
    query
        .replace("{{model}}", &rollout.model)
        .replace("{{stable}}", &rollout.stable)
        .replace("{{canary}}", &rollout.canary)
}

/// The number that a query gives; `None` where there is no data.
async fn ask(client: &reqwest::Client, url: &str, expression: &str) -> Result<Option<f64>, QueryError> {
    let url = format!("{}/api/v1/query", url.trim_end_matches('/'));
    let answer: Answer = client
        .get(url)
        .query(&[("query", expression)])
        .send()
        .await?
        .json()
        .await?;
    let text = match answer.data {
        None => return Err(QueryError::Refused(answer.error)),
        Some(Data::Scalar((_, text))) => text,
        Some(Data::Vector(samples)) => match samples.as_slice() {
            [] => return Ok(None),
            [one] => one.value.1.clone(),
            many => return Err(QueryError::Series(many.len())),
        },
        Some(Data::Other) => return Err(QueryError::Series(0)),
    };
    let value: f64 = text.parse().map_err(|_| QueryError::Value(text))?;
    // A division by nothing is no data.
    Ok((!value.is_nan()).then_some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Option<Data> {
        serde_json::from_str::<Answer>(json).unwrap().data
    }

    #[test]
    fn answers_of_prometheus_are_read() {
        let vector = r#"{"status":"success","data":{"resultType":"vector","result":[{"metric":{},"value":[1.5,"0.25"]}]}}"#;
        assert!(matches!(read(vector), Some(Data::Vector(samples)) if samples[0].value.1 == "0.25"));
        let scalar = r#"{"status":"success","data":{"resultType":"scalar","result":[1.5,"3"]}}"#;
        assert!(matches!(read(scalar), Some(Data::Scalar((_, text))) if text == "3"));
        let refused = r#"{"status":"error","errorType":"bad_data","error":"parse error"}"#;
        assert!(read(refused).is_none());
    }
}
