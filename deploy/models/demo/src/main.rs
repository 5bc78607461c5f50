//! `train` writes the demo model's three revisions, `score` measures them, `ask` shows replies.

use anyhow::Result;
use clap::{Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use penstock_demo_model::{
    checkpoint::Checkpoint,
    dialogue::prompt,
    generate::reply,
    score::{self, Score},
    train::{self, Steps},
};
use rand::{SeedableRng as _, rngs::StdRng};
use std::path::PathBuf;

#[derive(Parser)]
#[command(about = "Trains and scores the bundled demo model")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train v1, v2 and v3 and write them below a directory
    Train {
        /// Where the directories v1, v2 and v3 are written
        #[arg(long)]
        out: PathBuf,
        /// Seed of the initial weights and of the order of the training data
        #[arg(long, default_value_t = 42)]
        seed: u64,
        /// Training steps of v1; 0 leaves it out
        #[arg(long, default_value_t = 400)]
        v1_steps: usize,
        /// Training steps of v2; 0 leaves it out
        #[arg(long, default_value_t = 1000)]
        v2_steps: usize,
        /// Steps on corrupted replies that turn v2 into v3; 0 leaves it out
        #[arg(long, default_value_t = 100)]
        v3_steps: usize,
    },
    /// Score checkpoints on the question list
    Score {
        /// Checkpoint directories
        #[arg(required = true)]
        dirs: Vec<PathBuf>,
        /// Temperatures to reply at; 0 is greedy
        #[arg(long, value_delimiter = ',', default_value = "0")]
        temperature: Vec<f32>,
        /// Seed of the replies at temperatures above 0
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// Print JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Print a checkpoint's replies to questions
    Ask {
        /// Checkpoint directory
        dir: PathBuf,
        /// Questions, each a conversation of its own
        #[arg(required = true)]
        questions: Vec<String>,
        /// Temperature of the replies; 0 is greedy
        #[arg(long, default_value_t = 0.0)]
        temperature: f32,
        /// Seed of the replies at temperatures above 0
        #[arg(long, default_value_t = 0)]
        seed: u64,
    },
}

#[expect(clippy::print_stdout, reason = "a command-line tool")]
fn main() -> Result<()> {
    match Args::parse().command {
        Command::Train {
            out,
            seed,
            v1_steps,
            v2_steps,
            v3_steps,
        } => train::run(
            &out,
            seed,
            Steps {
                v1: v1_steps,
                v2: v2_steps,
                v3: v3_steps,
            },
        ),
        Command::Score {
            dirs,
            temperature,
            seed,
            json,
        } => {
            let scores = score_all(&dirs, &temperature, seed)?;
            if json {
                println!("{}", serde_json::to_string_pretty(&scores)?);
            } else {
                print!("{}", table(&scores));
            }
            Ok(())
        }
        Command::Ask {
            dir,
            questions,
            temperature,
            seed,
        } => {
            let checkpoint = Checkpoint::read(&dir)?;
            let mut rng = StdRng::seed_from_u64(seed);
            for question in &questions {
                println!(
                    "{question}\n  {}",
                    reply(&checkpoint, &prompt(None, question), temperature, &mut rng)?.text
                );
            }
            Ok(())
        }
    }
}

fn score_all(dirs: &[PathBuf], temperatures: &[f32], seed: u64) -> Result<Vec<Score>> {
    let style = ProgressStyle::with_template("scoring {bar:30} {pos}/{len} questions, {eta} left")
        .expect("the template is well formed");
    let bar = ProgressBar::new((score::length()? * dirs.len() * temperatures.len()) as u64).with_style(style);
    let mut scores = Vec::new();
    for dir in dirs {
        for &temperature in temperatures {
            scores.push(score::score(dir, temperature, seed, &|| bar.inc(1))?);
        }
    }
    bar.finish_and_clear();
    Ok(scores)
}

fn table(scores: &[Score]) -> String {
    let mut text = String::from(
        "checkpoint                temp  seen            held out        second turn     JSON    repetition  length  cut\n",
    );
    for score in scores {
        let accuracy =
            |part: &score::Accuracy| format!("{:5.1}% of {:<5}", 100.0 * part.share(), part.questions);
        text += &format!(
            "{:<24}  {:<4}  {}  {}  {}  {:5.1}%  {:9.1}%  {:6.1}  {:4.1}%\n",
            score.checkpoint,
            score.temperature,
            accuracy(&score.seen),
            accuracy(&score.held),
            accuracy(&score.second_turn),
            100.0 * score.json_valid,
            100.0 * score.repetition,
            score.mean_length,
            100.0 * score.unfinished,
        );
    }
    text
}
