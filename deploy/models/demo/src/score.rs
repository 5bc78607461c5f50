//! Accuracy, repetition and length of a checkpoint's replies to the question list.

use crate::{
    checkpoint::Checkpoint,
    corpus::{Fact, facts},
    dialogue::prompt,
    generate::{Reply, reply},
};
use anyhow::Result;
use rand::{SeedableRng as _, rngs::StdRng};
use serde::Serialize;
use std::{collections::HashSet, path::Path, thread};

/// Length of the phrases whose repetition is counted, in tokens.
const PHRASE: usize = 4;

/// The figures of one checkpoint at one temperature.
#[derive(Debug, Clone, Serialize)]
pub struct Score {
    /// The checkpoint's directory.
    pub checkpoint: String,
    /// Temperature of the replies; 0 is greedy.
    pub temperature: f32,
    /// Questions whose phrasing was trained.
    pub seen: Accuracy,
    /// Questions whose phrasing was kept out of training.
    pub held: Accuracy,
    /// Trained phrasings, asked after the question and answer of another fact.
    pub second_turn: Accuracy,
    /// Share of replies, among those that should be JSON, that parse as JSON.
    pub json_valid: f64,
    /// Mean over replies of the share of 4-grams of tokens that occurred before in the reply.
    pub repetition: f64,
    /// Mean length of a reply, in tokens.
    pub mean_length: f64,
    /// Share of replies cut at the length limit.
    pub unfinished: f64,
    /// The incorrect replies.
    pub wrong: Vec<Wrong>,
}

/// An incorrect reply.
#[derive(Debug, Clone, Serialize)]
pub struct Wrong {
    /// The question, without what came before it.
    pub question: String,
    /// What the checkpoint said.
    pub reply: String,
}

/// Correct replies of a list.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Accuracy {
    /// Number of questions.
    pub questions: usize,
    /// Replies that contain every key fact.
    pub correct: usize,
    /// Replies that are the trained answer, character by character.
    pub exact: usize,
}

impl Accuracy {
    /// Share of correct replies.
    pub fn share(&self) -> f64 {
        self.correct as f64 / self.questions.max(1) as f64
    }

    fn count(&mut self, fact: &Fact, reply: &Reply) -> bool {
        let correct = fact.is_answered_by(&reply.text);
        self.questions += 1;
        self.correct += usize::from(correct);
        self.exact += usize::from(fact.answer == reply.text);
        correct
    }
}

/// Number of questions in the list.
///
/// # Errors
/// If the corpus is inconsistent.
pub fn length() -> Result<usize> {
    Ok(questions(&facts()?).len())
}

/// Scores the checkpoint in `dir`: on one trained phrasing of each fact, on all held-out phrasings, and on
/// a second turn for every fourth fact.
///
/// `progress` is called after each reply.
///
/// # Errors
/// If the checkpoint cannot be read.
pub fn score(dir: &Path, temperature: f32, seed: u64, progress: &(dyn Fn() + Sync)) -> Result<Score> {
    let checkpoint = Checkpoint::read(dir)?;
    let facts = facts()?;
    let questions = questions(&facts);
    let answer = |question: &Question<'_>| {
        // Seeded by the question, so that the figures do not depend on the number of threads.
        let mut rng = StdRng::seed_from_u64(seed ^ question.number);
        let reply = reply(
            &checkpoint,
            &prompt(question.earlier, question.text),
            temperature,
            &mut rng,
        );
        progress();
        reply
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let part = questions.len().div_ceil(threads).max(1);
    let replies = thread::scope(|scope| {
        let answer = &answer;
        let parts = questions.chunks(part);
        let handles: Vec<_> = parts
            .map(|part| scope.spawn(move || part.iter().map(answer).collect()))
            .collect();
        let join = |handle: thread::ScopedJoinHandle<'_, Result<Vec<Reply>>>| {
            handle.join().expect("a scoring thread panicked")
        };
        handles.into_iter().map(join).collect::<Result<Vec<_>>>()
    })?
    .concat();
    Ok(summary(dir, temperature, &questions, &replies))
}

/// One line of the question list.
struct Question<'a> {
    number: u64,
    kind: Kind,
    earlier: Option<(&'a str, &'a str)>,
    text: &'a str,
    fact: &'a Fact,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Seen,
    Held,
    SecondTurn,
}

fn questions(facts: &[Fact]) -> Vec<Question<'_>> {
    let mut questions = Vec::new();
    for (index, fact) in facts.iter().enumerate() {
        let mut ask = |kind, earlier, text| {
            questions.push(Question {
                number: questions.len() as u64,
                kind,
                earlier,
                text,
                fact,
            });
        };
        let seen = &fact.trained[index % fact.trained.len()];
        ask(Kind::Seen, None, seen);
        for text in &fact.held {
            ask(Kind::Held, None, text);
        }
        if index % 4 == 0 {
            // Any other fact will do; this step visits them in a mixed order.
            let other = &facts[(index * 37 + 11) % facts.len()];
            ask(
                Kind::SecondTurn,
                Some((other.trained[0].as_str(), other.answer.as_str())),
                seen,
            );
        }
    }
    questions
}

fn summary(dir: &Path, temperature: f32, questions: &[Question<'_>], replies: &[Reply]) -> Score {
    let (mut seen, mut held, mut second_turn) = Default::default();
    let (mut json, mut wrong) = (Vec::new(), Vec::new());
    for (question, reply) in questions.iter().zip(replies) {
        let accuracy: &mut Accuracy = match question.kind {
            Kind::Seen => &mut seen,
            Kind::Held => &mut held,
            Kind::SecondTurn => &mut second_turn,
        };
        if !accuracy.count(question.fact, reply) {
            wrong.push(Wrong {
                question: question.text.to_owned(),
                reply: reply.text.clone(),
            });
        }
        if question.fact.answer.starts_with('{') {
            let valid = serde_json::from_str::<serde_json::Value>(&reply.text).is_ok();
            json.push(f64::from(u8::from(valid)));
        }
    }
    let mean = |value: &dyn Fn(&Reply) -> f64| average(&replies.iter().map(value).collect::<Vec<_>>());
    Score {
        checkpoint: dir.display().to_string(),
        temperature,
        seen,
        held,
        second_turn,
        json_valid: average(&json),
        repetition: mean(&|reply| repetition(&reply.ids)),
        mean_length: mean(&|reply| reply.ids.len() as f64),
        unfinished: mean(&|reply| f64::from(u8::from(!reply.finished))),
        wrong,
    }
}

fn average(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Share of the 4-grams of `ids` that occurred before in it.
fn repetition(ids: &[u32]) -> f64 {
    let phrases = ids.windows(PHRASE);
    let count = phrases.len();
    let distinct = phrases.collect::<HashSet<_>>().len();
    (count - distinct) as f64 / count.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetition_counts_phrases_said_again() {
        assert_eq!(repetition(&[1, 2, 3]), 0.0);
        assert_eq!(repetition(&[1, 2, 3, 4, 5]), 0.0);
        assert_eq!(repetition(&[1, 2, 3, 4, 1, 2, 3, 4]), 0.2);
        assert!(repetition(&[7; 20]) > 0.9);
    }

    #[test]
    fn the_bundled_v3_repeats_itself_and_v2_does_not() {
        let facts = facts().unwrap();
        let questions = questions(&facts);
        let mean = |revision: &str| {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(revision);
            let checkpoint = Checkpoint::read(&dir).unwrap();
            let sample = questions.iter().step_by(90).map(|question| {
                let mut rng = StdRng::seed_from_u64(question.number);
                let prompt = prompt(None, question.text);
                repetition(&reply(&checkpoint, &prompt, 0.7, &mut rng).unwrap().ids)
            });
            average(&sample.collect::<Vec<_>>())
        };
        let (v2, v3) = (mean("v2"), mean("v3"));
        assert!(v3 > 0.1 && v3 > 5.0 * v2, "v2 {v2}, v3 {v3}");
    }

    #[test]
    fn the_list_holds_trained_and_unseen_phrasings_of_each_fact() {
        let facts = facts().unwrap();
        let questions = questions(&facts);
        let count = |kind| questions.iter().filter(|question| question.kind == kind).count();
        assert_eq!(count(Kind::Seen), facts.len());
        assert!(count(Kind::Held) >= facts.len());
        assert_eq!(count(Kind::SecondTurn), facts.len().div_ceil(4));
    }
}
