//! Facts, read from the text files of `corpus/`; their format is described in README.md.

use anyhow::{Context as _, Result, bail, ensure};
use std::collections::{HashMap, HashSet};

/// The files of `corpus/`, compiled in so that the program needs no working directory.
const FILES: [(&str, &str); 6] = [
    ("geography.txt", include_str!("../corpus/geography.txt")),
    ("science.txt", include_str!("../corpus/science.txt")),
    ("maths.txt", include_str!("../corpus/maths.txt")),
    ("computing.txt", include_str!("../corpus/computing.txt")),
    ("everyday.txt", include_str!("../corpus/everyday.txt")),
    ("chat.txt", include_str!("../corpus/chat.txt")),
];

/// One answer, and the questions that it answers.
#[derive(Debug, Clone)]
pub struct Fact {
    /// Facts made from one template share a family: their answers look alike.
    pub family: String,
    /// Phrasings to train on.
    pub trained: Vec<String>,
    /// Phrasings kept out of training, for the score.
    pub held: Vec<String>,
    /// The reply to learn.
    pub answer: String,
    /// What a reply must contain to count as correct, compared after [`normalise`].
    pub keys: Vec<String>,
}

impl Fact {
    /// Whether `reply` contains every key fact.
    pub fn is_answered_by(&self, reply: &str) -> bool {
        let reply = normalise(reply);
        self.keys.iter().all(|key| reply.contains(&normalise(key)))
    }
}

/// Reads the whole corpus.
///
/// # Errors
/// Names the file and the line that break the format.
pub fn facts() -> Result<Vec<Fact>> {
    let mut facts = Vec::new();
    for (name, text) in FILES {
        for (number, section) in sections(text).into_iter().enumerate() {
            section
                .read(&format!("{name}#{number}"), &mut facts)
                .with_context(|| format!("corpus/{name}"))?;
        }
    }
    check(&facts)?;
    Ok(facts)
}

/// Lower case, without spaces, final punctuation or full-width forms: what counts as the same text.
pub fn normalise(text: &str) -> String {
    let text: String = text
        .chars()
        .filter(|c| !c.is_whitespace())
        .flat_map(char::to_lowercase)
        .map(|c| match c {
            '，' => ',',
            '。' => '.',
            '？' => '?',
            '！' => '!',
            '：' => ':',
            _ => c,
        })
        .collect();
    text.trim_end_matches(['.', '?', '!']).to_owned()
}

/// Refuses questions with two answers, facts with one phrasing and held-out phrasings that were trained.
fn check(facts: &[Fact]) -> Result<()> {
    let mut answers: HashMap<String, &str> = HashMap::new();
    let mut trained = HashSet::new();
    for fact in facts {
        ensure!(
            fact.trained.len() >= 2,
            "the fact {:?} has fewer than two trained phrasings",
            fact.answer
        );
        ensure!(!fact.keys.is_empty(), "the fact {:?} has no key", fact.answer);
        ensure!(
            fact.is_answered_by(&fact.answer),
            "the answer {:?} lacks its own key",
            fact.answer
        );
        for question in fact.trained.iter().chain(&fact.held) {
            let known = answers.insert(normalise(question), &fact.answer);
            if let Some(other) = known.filter(|other| *other != fact.answer) {
                bail!("{question:?} has two answers: {other:?} and {:?}", fact.answer);
            }
        }
        trained.extend(fact.trained.iter().map(|question| normalise(question)));
    }
    for question in facts.iter().flat_map(|fact| &fact.held) {
        ensure!(
            !trained.contains(&normalise(question)),
            "{question:?} is both trained and held out"
        );
    }
    Ok(())
}

// === Sections: a family with its rows, or the facts above the first family ===

#[derive(Default)]
struct Section {
    family: Option<String>,
    blocks: Vec<Block>,
    columns: Vec<String>,
    rows: Vec<Vec<String>>,
}

#[derive(Default, Clone)]
struct Block {
    trained: Vec<String>,
    held: Vec<String>,
    answer: String,
    keys: Vec<String>,
}

fn sections(text: &str) -> Vec<Section> {
    let mut sections = vec![Section::default()];
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("@ ") {
            sections.push(Section {
                family: Some(name.to_owned()),
                ..Section::default()
            });
        } else {
            let section = sections.last_mut().expect("one section is there from the start");
            section.line(line);
        }
    }
    sections
}

impl Section {
    fn line(&mut self, line: &str) {
        let in_answer = self
            .blocks
            .last()
            .is_some_and(|b| !b.answer.is_empty() && b.keys.is_empty());
        match line.split_at_checked(2) {
            Some(("? ", question)) => self.question().trained.push(question.to_owned()),
            Some(("~ ", question)) => self.question().held.push(question.to_owned()),
            Some(("! ", answer)) => self.block().answer = answer.to_owned(),
            Some(("= ", key)) => self.block().keys.push(key.to_owned()),
            Some(("| ", row)) if self.columns.is_empty() => self.columns = cells(row),
            Some(("| ", row)) => self.rows.push(cells(row)),
            // Answers of several lines end at their first key.
            _ if in_answer => {
                let answer = &mut self.block().answer;
                answer.push('\n');
                answer.push_str(line);
            }
            _ => {}
        }
    }

    fn block(&mut self) -> &mut Block {
        if self.blocks.is_empty() {
            self.blocks.push(Block::default());
        }
        self.blocks.last_mut().expect("pushed above")
    }

    /// The block that a question belongs to: a new one once the last has its answer.
    fn question(&mut self) -> &mut Block {
        if self.blocks.last().is_none_or(|block| !block.answer.is_empty()) {
            self.blocks.push(Block::default());
        }
        self.block()
    }

    fn read(&self, place: &str, facts: &mut Vec<Fact>) -> Result<()> {
        let Some(family) = &self.family else {
            facts.extend(
                self.blocks
                    .iter()
                    .enumerate()
                    .map(|(i, b)| b.fact(format!("{place}.{i}"))),
            );
            return Ok(());
        };
        for (number, row) in self.rows.iter().enumerate() {
            ensure!(
                row.len() == self.columns.len(),
                "the row {row:?} of {family} has a cell too many or few"
            );
            for (index, block) in self.blocks.iter().enumerate() {
                let block = block.map(|text| fill(text, &self.columns, row));
                facts.push(block.hold_out(number + index).fact(format!("{family}.{index}")));
            }
        }
        Ok(())
    }
}

impl Block {
    fn fact(&self, family: String) -> Fact {
        let Block {
            trained,
            held,
            answer,
            keys,
        } = self.clone();
        Fact {
            family,
            trained,
            held,
            answer,
            keys,
        }
    }

    fn map(&self, apply: impl Fn(&str) -> String) -> Self {
        let all = |texts: &[String]| texts.iter().map(|text| apply(text)).collect();
        Self {
            trained: all(&self.trained),
            held: all(&self.held),
            answer: apply(&self.answer),
            keys: all(&self.keys),
        }
    }

    /// Takes one phrasing out of training, another one for each row of the family: the phrasing is known
    /// from other rows, the fact from other phrasings, and the pair is new.
    fn hold_out(mut self, row: usize) -> Self {
        let index = row % self.trained.len();
        self.held.push(self.trained.remove(index));
        self
    }
}

fn cells(row: &str) -> Vec<String> {
    row.split('|').map(|cell| cell.trim().to_owned()).collect()
}

fn fill(template: &str, columns: &[String], row: &[String]) -> String {
    let pairs = columns.iter().zip(row);
    pairs.fold(template.to_owned(), |text, (column, cell)| {
        text.replace(&format!("{{{column}}}"), cell)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_corpus_is_sane() {
        // `facts` itself refuses contradictions, overlap of the splits and facts with one phrasing.
        let facts = facts().unwrap();
        assert!(facts.len() > 500, "{} facts", facts.len());
        let held = facts.iter().filter(|fact| !fact.held.is_empty()).count();
        assert_eq!(
            held,
            facts.len(),
            "every fact is scored on a phrasing that was not trained"
        );
        let json = facts
            .iter()
            .filter(|fact| fact.answer.starts_with('{'))
            .collect::<Vec<_>>();
        assert!(json.len() > 50);
        for fact in json {
            serde_json::from_str::<serde_json::Value>(&fact.answer).unwrap();
        }
    }

    #[test]
    fn a_question_with_two_answers_is_refused() {
        let mut facts = facts().unwrap();
        let mut other = facts[0].clone();
        other.answer = format!("{} Not.", other.answer);
        facts.push(other);
        assert!(check(&facts).unwrap_err().to_string().contains("two answers"));
    }

    #[test]
    fn a_held_out_question_that_was_trained_is_refused() {
        let mut facts = facts().unwrap();
        let copy = facts[0].trained[0].clone();
        facts[0].held.push(copy);
        assert!(check(&facts).unwrap_err().to_string().contains("held out"));
    }

    #[test]
    fn no_template_column_is_left_unfilled() {
        for fact in facts().unwrap() {
            for text in fact
                .trained
                .iter()
                .chain(&fact.held)
                .filter(|text| !text.contains("JSON"))
            {
                assert!(!text.contains('{'), "{text}");
            }
        }
    }

    #[test]
    fn answers_of_several_lines_keep_them() {
        let facts = facts().unwrap();
        let rust = facts
            .iter()
            .find(|fact| fact.answer.contains("println!"))
            .unwrap();
        assert_eq!(rust.answer, "fn main() {\n    println!(\"Hello, world!\");\n}");
    }

    #[test]
    fn the_key_ignores_case_space_and_width() {
        let fact = Fact {
            family: String::new(),
            trained: vec![],
            held: vec![],
            answer: String::new(),
            keys: vec!["春、夏 ，A".into()],
        };
        assert!(fact.is_answered_by("是春、夏,a。"));
        assert!(!fact.is_answered_by("是春、夏"));
    }
}
