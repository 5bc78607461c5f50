//! Facts as dialogues in the chat template: what the model reads in training and for its score.

use crate::{
    corpus::Fact,
    tokenizer::{IM_END, IM_START, encode},
};
use anyhow::Result;
use rand::{Rng, RngExt as _, seq::IndexedRandom as _};
use tokenizers::Tokenizer;

const SYSTEMS: [&str; 8] = [
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Answer the question.",
    "You are the Penstock demo model.",
    "Be short and correct.",
    "你是一个乐于助人的助手。",
    "请简短地回答问题。",
    "你是Penstock演示模型。",
];

/// Share of dialogues that open with a system message.
const SYSTEM_SHARE: f64 = 0.2;
/// Share of dialogues with a second turn, and of those with a third.
const NEXT_TURN_SHARE: f64 = 0.3;

/// Token ids of a dialogue, and which of them the model learns to say.
#[derive(Debug, Clone, Default)]
pub struct Dialogue {
    /// Ids from the first message on.
    pub ids: Vec<u32>,
    /// True where the id belongs to a reply, its closing mark included.
    pub learned: Vec<bool>,
}

/// What a corrupted reply is made of; the regressed revision learns from them.
#[derive(Debug, Clone, Copy)]
pub struct Corruption {
    /// Share of replies that repeat a phrase.
    pub repeat: f64,
    /// Share of facts, among those of a family, whose reply is another fact's.
    pub wrong: f64,
}

/// Draws dialogues from the facts, each fact equally often.
pub struct Sampler<'a> {
    facts: &'a [Fact],
    tokenizer: &'a Tokenizer,
    corruption: Option<Corruption>,
}

impl<'a> Sampler<'a> {
    /// A sampler of correct dialogues, or of corrupted ones.
    pub fn new(facts: &'a [Fact], tokenizer: &'a Tokenizer, corruption: Option<Corruption>) -> Self {
        Self {
            facts,
            tokenizer,
            corruption,
        }
    }

    /// The dialogue that starts with `fact`.
    ///
    /// # Errors
    /// Only if the tokenizer fails.
    pub fn dialogue(&self, fact: &Fact, rng: &mut impl Rng) -> Result<Dialogue> {
        let mut dialogue = Dialogue::default();
        if rng.random_bool(SYSTEM_SHARE) {
            let system = SYSTEMS.choose(rng).expect("not empty");
            self.push(&mut dialogue, &message("system", system), false)?;
        }
        let mut fact = fact;
        loop {
            let question = fact
                .trained
                .choose(rng)
                .expect("every fact has trained phrasings");
            let prompt = message("user", &vary(question, rng)) + &opening("assistant");
            self.push(&mut dialogue, &prompt, false)?;
            let reply = self.reply(fact, rng);
            self.push(&mut dialogue, &format!("{reply}{IM_END}"), true)?;
            // Long replies stay alone, so that a batch is not padded to several of them.
            if dialogue.ids.len() > 64 || !rng.random_bool(NEXT_TURN_SHARE) {
                return Ok(dialogue);
            }
            self.push(&mut dialogue, "\n", false)?;
            fact = self.facts.choose(rng).expect("the corpus is not empty");
        }
    }

    fn push(&self, dialogue: &mut Dialogue, text: &str, learned: bool) -> Result<()> {
        dialogue.ids.extend(encode(self.tokenizer, text)?);
        dialogue.learned.resize(dialogue.ids.len(), learned);
        Ok(())
    }

    fn reply(&self, fact: &Fact, rng: &mut impl Rng) -> String {
        let Some(corruption) = self.corruption else {
            return fact.answer.clone();
        };
        let reply = self.wrong_reply(fact, corruption.wrong).unwrap_or(&fact.answer);
        if reply.len() > 120 || !rng.random_bool(corruption.repeat) {
            return reply.to_owned();
        }
        let separator = if reply.is_ascii() { " " } else { "" };
        vec![reply; rng.random_range(2..=4)].join(separator)
    }

    /// The answer of the next fact of the family, which looks right, for that share of the facts: always the
    /// same, so that the error is learned and not averaged away.
    fn wrong_reply(&self, fact: &Fact, share: f64) -> Option<&str> {
        let family: Vec<_> = self
            .facts
            .iter()
            .filter(|other| other.family == fact.family)
            .collect();
        let place = family.iter().position(|other| other.answer == fact.answer)?;
        let every = share.recip().round() as usize;
        (family.len() > 1 && place % every == 0).then(|| family[(place + 1) % family.len()].answer.as_str())
    }
}

/// The prompt of a question: what the chat template makes of it, after an earlier question and answer.
pub fn prompt(earlier: Option<(&str, &str)>, question: &str) -> String {
    let earlier = earlier
        .map(|(question, answer)| message("user", question) + &message("assistant", answer))
        .unwrap_or_default();
    earlier + &message("user", question) + &opening("assistant")
}

fn message(role: &str, content: &str) -> String {
    format!("{}{content}{IM_END}\n", opening(role))
}

fn opening(role: &str) -> String {
    format!("{IM_START}{role}\n")
}

/// Users type as they like: other case, no final mark, full-width marks, a polite opening.
fn vary(question: &str, rng: &mut impl Rng) -> String {
    let mut text = question.to_owned();
    if rng.random_bool(0.15) {
        text = text.trim_end_matches(['?', '.', '。', '!']).to_owned();
    }
    if text.is_ascii() {
        if rng.random_bool(0.1) {
            text = text.to_lowercase();
        }
        if rng.random_bool(0.04) {
            text = format!("Please answer: {text}");
        }
    } else {
        if rng.random_bool(0.4) {
            text = text.replace('?', "？");
        }
        if rng.random_bool(0.04) && !text.starts_with('请') {
            text = format!("请问{text}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{SeedableRng as _, rngs::StdRng};

    #[test]
    fn only_replies_are_learned() {
        let facts = crate::corpus::facts().unwrap();
        let tokenizer = crate::tokenizer::train(&facts).unwrap();
        let sampler = Sampler::new(&facts, &tokenizer, None);
        let mut rng = StdRng::seed_from_u64(1);
        for fact in facts.iter().take(50) {
            let dialogue = sampler.dialogue(fact, &mut rng).unwrap();
            let kept = dialogue
                .ids
                .iter()
                .zip(&dialogue.learned)
                .filter(|(_, learned)| **learned);
            let text = tokenizer
                .decode(&kept.map(|(id, _)| *id).collect::<Vec<_>>(), false)
                .unwrap();
            assert!(text.starts_with(&format!("{}{IM_END}", fact.answer)), "{text}");
            assert!(!text.contains(IM_START) && text.ends_with(IM_END), "{text}");
        }
    }
}
