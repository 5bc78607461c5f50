//! Conversations on workers with prefix caches, in virtual time: arrivals, prefill in turn, decode side by side.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use gateway::balance::{Balancer, Candidate, Ended, Expected, Glance, Load, Policy, Want, hash};
use penstock_proto::v1;
use prost::Message as _;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

/// Tokens in a page of a worker's cache.
const PAGE: usize = 16;
/// Tokens of prompt that a worker computes in a second.
const PREFILL_PER_S: f64 = 8000.0;
/// Time per token of a reply.
const DECODE: Duration = Duration::from_millis(20);
/// Bytes of text per token.
const BYTES: usize = 4;

/// What is asked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Trace {
    /// Conversations.
    pub conversations: u64,
    /// Turns of each.
    pub turns: usize,
    /// Tokens of a user's turn.
    pub turn_tokens: usize,
    /// Tokens of a reply.
    pub reply_tokens: usize,
    /// Tokens of the prompt that all share.
    pub system_tokens: usize,
}

/// Who answers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fleet {
    /// Workers.
    pub workers: usize,
    /// Tokens that the cache of each holds.
    pub cache_tokens: usize,
    /// Gateways, which do not talk to each other; each request goes to any.
    pub gateways: usize,
    /// How they choose.
    pub policy: Policy,
}

/// What came of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outcome {
    /// Share of the prompts' tokens that were cached.
    pub hit_rate: f64,
    /// Work of the busiest worker by that of the mean one.
    pub imbalance: f64,
    /// Median and 99th percentile of the time to the first token.
    pub ttft: [Duration; 2],
}

struct Worker {
    cache: Cache,
    /// When its prefill queue is empty.
    free_at: Duration,
    sequences: u32,
    work: usize,
}

struct Gateway {
    balancer: Balancer,
    loads: Vec<Load>,
}

/// The least recently used pages leave first; of one prompt, the last ones.
struct Cache {
    room: usize,
    pages: HashMap<u64, (u64, std::cmp::Reverse<usize>)>,
    order: BTreeMap<(u64, std::cmp::Reverse<usize>), u64>,
    clock: u64,
}

enum Event {
    Ask { conversation: u64, turn: usize },
    End(Box<Running>),
}

struct Running {
    gateway: usize,
    worker: usize,
    want: Want,
    expected: Expected,
    ended: Ended,
    next: Option<(u64, usize)>,
}

/// Plays the trace.
pub(crate) fn play(trace: &Trace, fleet: &Fleet, seed: u64) -> Outcome {
    Simulation::new(*trace, *fleet, seed).run()
}

struct Simulation {
    trace: Trace,
    rng: StdRng,
    start: Instant,
    workers: Vec<Worker>,
    gateways: Vec<Gateway>,
    events: BTreeMap<(Duration, u64), Event>,
    scheduled: u64,
    prompt: usize,
    cached: usize,
    ttft: Vec<Duration>,
}

impl Simulation {
    fn new(trace: Trace, fleet: Fleet, seed: u64) -> Self {
        let start = Instant::now();
        let worker = |_| Worker {
            cache: Cache::new(fleet.cache_tokens),
            free_at: Duration::ZERO,
            sequences: 0,
            work: 0,
        };
        let gateway = |_| Gateway {
            balancer: Balancer::new(fleet.policy, 1 << 17),
            loads: vec![Load::new(start); fleet.workers],
        };
        Self {
            trace,
            rng: StdRng::seed_from_u64(seed),
            start,
            workers: (0..fleet.workers).map(worker).collect(),
            gateways: (0..fleet.gateways).map(gateway).collect(),
            events: BTreeMap::new(),
            scheduled: 0,
            prompt: 0,
            cached: 0,
            ttft: Vec::new(),
        }
    }

    fn run(mut self) -> Outcome {
        for conversation in 0..self.trace.conversations {
            let at = self.between(0, 30_000);
            self.schedule(
                at,
                Event::Ask {
                    conversation,
                    turn: 0,
                },
            );
        }
        while let Some(((now, _), event)) = self.events.pop_first() {
            match event {
                Event::Ask { conversation, turn } => self.ask(now, conversation, turn),
                Event::End(running) => self.end(now, &running),
            }
        }
        let work: Vec<usize> = self.workers.iter().map(|worker| worker.work).collect();
        let mean = work.iter().sum::<usize>() as f64 / work.len() as f64;
        self.ttft.sort_unstable();
        let quantile = |q: f64| self.ttft[((self.ttft.len() - 1) as f64 * q) as usize];
        Outcome {
            hit_rate: self.cached as f64 / self.prompt as f64,
            imbalance: work.iter().copied().max().unwrap_or(0) as f64 / mean,
            ttft: [quantile(0.5), quantile(0.99)],
        }
    }

    fn ask(&mut self, now: Duration, conversation: u64, turn: usize) {
        let at = self.start + now;
        let request = self.trace.request(conversation, turn).encode_to_vec();
        let glance = Glance::of(&request).expect("prost writes messages that can be read");
        let gateway = self.rng.random_range(0..self.gateways.len());
        let Gateway { balancer, loads } = &mut self.gateways[gateway];
        let want = balancer.want(&glance, 0, None);
        let candidates: Vec<Candidate> = loads
            .iter()
            .enumerate()
            .map(|(id, load)| Candidate {
                id: hash(1, &id.to_le_bytes()),
                load: load.total(want.tokens, at),
            })
            .collect();
        let chosen = balancer
            .choose(&want, &candidates, self.rng.random())
            .expect("there is a worker");
        let expected = balancer.expects(&want, candidates[chosen].id);
        balancer.sent(&want, candidates[chosen].id);
        loads[chosen].begin(want.tokens);

        let (pages, prompt) = self.trace.pages(conversation, turn);
        let worker = &mut self.workers[chosen];
        let cached = worker.cache.use_prefix(&pages);
        let reply = self.trace.reply_tokens;
        // The reply's tokens are cached, and part of the next prompt.
        worker.cache.insert(&self.trace.after(conversation, turn));
        let computed = prompt - cached;
        worker.work += computed + reply;
        worker.sequences += 1;
        let begins = worker.free_at.max(now);
        worker.free_at = begins + Duration::from_secs_f64(computed as f64 / PREFILL_PER_S);
        let first = worker.free_at + DECODE;
        let ends = first + DECODE * u32::try_from(reply).unwrap_or(u32::MAX);
        self.ttft.push(first - now);
        self.prompt += prompt;
        self.cached += cached;
        let count = |tokens: usize| u32::try_from(tokens).unwrap_or(u32::MAX);
        let running = Running {
            gateway,
            worker: chosen,
            want,
            expected,
            ended: Ended {
                prompt_tokens: count(prompt),
                cached_tokens: count(cached),
                completion_tokens: count(reply),
            },
            next: (turn + 1 < self.trace.turns).then_some((conversation, turn + 1)),
        };
        self.schedule(ends, Event::End(Box::new(running)));
    }

    fn end(&mut self, now: Duration, running: &Running) {
        let at = self.start + now;
        let worker = &mut self.workers[running.worker];
        worker.sequences -= 1;
        let Gateway { balancer, loads } = &mut self.gateways[running.gateway];
        let load = &mut loads[running.worker];
        load.reported(u64::from(worker.sequences) + 1, at);
        load.end(running.want.tokens, at);
        let id = hash(1, &running.worker.to_le_bytes());
        balancer.ended(&running.want, id, running.expected, running.ended);
        if let Some((conversation, turn)) = running.next {
            let thinks = self.between(1000, 5000);
            self.schedule(now + thinks, Event::Ask { conversation, turn });
        }
    }

    fn between(&mut self, from_ms: u64, to_ms: u64) -> Duration {
        Duration::from_millis(self.rng.random_range(from_ms..to_ms))
    }

    fn schedule(&mut self, at: Duration, event: Event) {
        self.scheduled += 1;
        self.events.insert((at, self.scheduled), event);
    }
}

impl Trace {
    /// Tokens of a conversation when its turn number `turn` is asked.
    fn prompt_tokens(&self, turn: usize) -> usize {
        self.system_tokens + turn * (self.turn_tokens + self.reply_tokens) + self.turn_tokens
    }

    /// Whole pages of a prompt, and its tokens.
    fn pages(&self, conversation: u64, turn: usize) -> (Vec<u64>, usize) {
        let tokens = self.prompt_tokens(turn);
        // At least one token is computed, so that there is something to sample from.
        (self.first_pages(conversation, (tokens - 1) / PAGE), tokens)
    }

    /// Whole pages of a prompt with its reply.
    fn after(&self, conversation: u64, turn: usize) -> Vec<u64> {
        self.first_pages(
            conversation,
            (self.prompt_tokens(turn) + self.reply_tokens) / PAGE,
        )
    }

    fn first_pages(&self, conversation: u64, count: usize) -> Vec<u64> {
        let shared = self.system_tokens / PAGE;
        let page = |index: usize| match index < shared {
            true => hash(7, &index.to_le_bytes()),
            false => hash(conversation + 8, &index.to_le_bytes()),
        };
        (0..count).map(page).collect()
    }

    fn request(&self, conversation: u64, turn: usize) -> v1::GenerateRequest {
        let text = |tag: u64, tokens: usize| {
            let mut text = String::new();
            let mut word = 0u64;
            while text.len() < tokens * BYTES {
                text.push_str(&format!("{:08x}", hash(tag, &word.to_le_bytes()) as u32));
                word += 1;
            }
            text
        };
        let message = |role: &str, content: String| v1::ChatMessage {
            role: role.into(),
            content,
        };
        let mut messages = vec![message("system", text(1, self.system_tokens))];
        for index in 0..=turn {
            let tag = 2 + conversation * 1000 + 2 * index as u64;
            messages.push(message("user", text(tag, self.turn_tokens)));
            if index < turn {
                messages.push(message("assistant", text(tag + 1, self.reply_tokens)));
            }
        }
        v1::GenerateRequest {
            model: "m".into(),
            input: Some(v1::generate_request::Input::Chat(v1::Chat { messages })),
            ..Default::default()
        }
    }
}

impl Cache {
    fn new(tokens: usize) -> Self {
        Self {
            room: tokens / PAGE,
            pages: HashMap::new(),
            order: BTreeMap::new(),
            clock: 0,
        }
    }

    /// Tokens of the prompt that are there; afterwards all are.
    fn use_prefix(&mut self, pages: &[u64]) -> usize {
        let hit = pages
            .iter()
            .take_while(|page| self.pages.contains_key(page))
            .count();
        self.insert(pages);
        hit * PAGE
    }

    fn insert(&mut self, pages: &[u64]) {
        self.clock += 1;
        for (depth, &page) in pages.iter().enumerate() {
            let place = (self.clock, std::cmp::Reverse(depth));
            if let Some(before) = self.pages.insert(page, place) {
                self.order.remove(&before);
            }
            self.order.insert(place, page);
        }
        while self.pages.len() > self.room {
            let Some((_, page)) = self.order.pop_first() else {
                break;
            };
            self.pages.remove(&page);
        }
    }
}
