//! The revisions that this worker serves.

use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard};

use penstock_engine::Engine;
use penstock_proto::v1;
use penstock_telemetry::instruments::{EngineRegistration, Served as Labels};
use penstock_text::{ChatTemplate, Tokenizer};
use tokio::sync::watch;

use crate::{
    generate::{CallError, Input, Violation, WatchWords},
    grammars::Grammars,
    memory::Reservation,
};

/// One revision: its engine and its text.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) model: String,
    pub(crate) revision: String,
    /// BLAKE3 of the checkpoint's manifest, in hex.
    pub(crate) digest: String,
    pub(crate) engine: Engine,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) template: Option<ChatTemplate>,
    pub(crate) grammars: Grammars,
    /// The checkpoint's end-of-sequence ids.
    pub(crate) eos_token_ids: Vec<u32>,
    /// Counted in its replies; a reply goes by those of its start.
    pub(crate) watch_words: RwLock<Arc<WatchWords>>,
    /// Labels of its metrics.
    pub(crate) labels: Labels,
    /// Its memory.
    pub(crate) _memory: Reservation,
    /// Its engine is measured while it is served.
    pub(crate) _observed: EngineRegistration,
}

/// A request's prompt.
#[derive(Debug)]
pub(crate) struct Prompt {
    pub(crate) ids: Vec<u32>,
    /// The text that was encoded; `None` where ids were given.
    pub(crate) text: Option<String>,
}

impl Served {
    /// `model@revision`.
    pub(crate) fn name(&self) -> String {
        format!("{}@{}", self.model, self.revision)
    }

    /// The words to count from now on.
    pub(crate) fn watch_words(&self) -> Arc<WatchWords> {
        self.watch_words
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Counts these words in replies that start from now on.
    pub(crate) fn watch(&self, words: Arc<WatchWords>) {
        *self.watch_words.write().unwrap_or_else(PoisonError::into_inner) = words;
    }

    /// Renders and tokenizes; takes milliseconds for long texts.
    pub(crate) fn encode(&self, input: Input) -> Result<Prompt, CallError> {
        let (text, add_special_tokens) = match input {
            Input::Ids(ids) => return Ok(Prompt { ids, text: None }),
            Input::Prompt(text) => (text, true),
            Input::Chat(messages) => {
                let template = self.template.as_ref().ok_or_else(|| {
                    let description = format!("{} has no chat template: send a prompt", self.name());
                    Violation::new("chat", description)
                })?;
                // The template writes the special tokens itself.
                (template.render(&messages, true)?, false)
            }
        };
        let ids = self.tokenizer.encode(&text, add_special_tokens)?;
        Ok(Prompt {
            ids,
            text: Some(text),
        })
    }

    /// The text of an echoed prompt.
    pub(crate) fn prompt_text(&self, prompt: &Prompt) -> String {
        if let Some(text) = &prompt.text {
            return text.clone();
        }
        let bytes: Vec<u8> = prompt
            .ids
            .iter()
            .flat_map(|&id| self.tokenizer.token_bytes_with_special(id))
            .copied()
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// All of them: those of the command line in its order, then those that were placed. Clones share the list.
#[derive(Debug, Clone, Default)]
pub(crate) struct Catalogue {
    list: Arc<RwLock<Vec<Arc<Served>>>>,
    /// Counts the changes.
    changes: watch::Sender<u64>,
}

impl Catalogue {
    pub(crate) fn all(&self) -> Vec<Arc<Served>> {
        self.list.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Every change from now on.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.all().is_empty()
    }

    pub(crate) fn add(&self, served: Arc<Served>) {
        self.write().push(served);
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// Takes a revision out; its engine ends with its last request.
    pub(crate) fn remove(&self, model: &str, revision: &str) {
        self.write()
            .retain(|served| served.model != model || served.revision != revision);
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// The revision of exactly this name.
    pub(crate) fn get(&self, model: &str, revision: &str) -> Option<Arc<Served>> {
        let mut all = self.all().into_iter();
        all.find(|served| served.model == model && served.revision == revision)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Vec<Arc<Served>>> {
        self.list.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The revision to serve: `revision` of `model`, or the model's first. An empty `model` is the only one.
    pub(crate) fn find(&self, model: &str, revision: Option<&str>) -> Result<Arc<Served>, CallError> {
        let all = self.all();
        let model = match all.first() {
            Some(first) if model.is_empty() && all.iter().all(|served| served.model == first.model) => {
                &first.model
            }
            _ if model.is_empty() => {
                return Err(Violation::new("model", format!("is missing; {}", listing(&all))).into());
            }
            _ => model,
        };
        let mut of_model = all.iter().filter(|served| served.model == model).peekable();
        if of_model.peek().is_none() {
            return Err(CallError::UnknownModel {
                model: model.into(),
                served: listing(&all),
            });
        }
        match of_model.find(|served| revision.is_none_or(|revision| served.revision == revision)) {
            Some(served) => Ok(served.clone()),
            None => Err(CallError::WrongRevision {
                model: model.into(),
                revision: revision.unwrap_or_default().into(),
                served: listing(&all),
            }),
        }
    }

    /// A revision whose engine makes no progress, and why.
    pub(crate) fn stalled(&self) -> Option<String> {
        self.all().iter().find_map(|served| {
            let stats = served.engine.stats();
            let why = || match stats.unavailable {
                Some(reason) => format!("the engine of {} cannot run a step: {reason}", served.name()),
                None => format!("the engine of {} completes no step", served.name()),
            };
            stats.progress_stalled.then(why)
        })
    }

    /// What `ListModels` answers.
    pub(crate) fn list(&self) -> v1::ListModelsResponse {
        let mut models: Vec<v1::ModelInfo> = Vec::new();
        for served in self.all() {
            let revision = v1::RevisionInfo {
                name: served.revision.clone(),
                digest: served.digest.clone(),
                context_length: u32::try_from(served.engine.context_length()).unwrap_or(u32::MAX),
            };
            match models.iter_mut().find(|model| model.name == served.model) {
                Some(model) => model.revisions.push(revision),
                None => models.push(v1::ModelInfo {
                    name: served.model.clone(),
                    stable: served.revision.clone(),
                    revisions: vec![revision],
                }),
            }
        }
        v1::ListModelsResponse { models }
    }
}

fn listing(all: &[Arc<Served>]) -> String {
    let names: Vec<String> = all.iter().map(|served| served.name()).collect();
    format!("served here: {}", names.join(", "))
}
