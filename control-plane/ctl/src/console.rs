//! The operator's terminal: data to stdout, all else to stderr.

use crate::error::CtlError;
use std::io::{self, BufRead as _, ErrorKind, IsTerminal as _, Write};

type Answer = Box<dyn FnMut() -> io::Result<String> + Send>;

/// Where a command writes, and whom it may ask.
pub(crate) struct Console {
    out: Box<dyn Write + Send>,
    err: Box<dyn Write + Send>,
    /// None without a terminal.
    answer: Option<Answer>,
    /// Whether stderr is a terminal, which can show progress bars.
    bars: bool,
    /// Whether stdin and stdout are a terminal, which can show a live view.
    screen: bool,
}

impl Console {
    /// The process's own streams.
    pub(crate) fn terminal() -> Self {
        let interactive = io::stdin().is_terminal() && io::stderr().is_terminal();
        let answer = || {
            let mut line = String::new();
            io::stdin().lock().read_line(&mut line)?;
            Ok(line)
        };
        Self {
            out: Box::new(io::stdout()),
            err: Box::new(io::stderr()),
            answer: interactive.then(|| Box::new(answer) as Answer),
            bars: io::stderr().is_terminal(),
            screen: io::stdin().is_terminal() && io::stdout().is_terminal(),
        }
    }

    #[cfg(test)]
    pub(crate) fn new(
        out: Box<dyn Write + Send>,
        err: Box<dyn Write + Send>,
        answer: Option<&'static str>,
    ) -> Self {
        Self {
            out,
            err,
            answer: answer.map(|text| Box::new(move || Ok(text.to_owned())) as Answer),
            bars: false,
            screen: false,
        }
    }

    /// Writes data to stdout at once. A reader that went away, as `head` does, is no error.
    pub(crate) fn data(&mut self, text: &str) -> Result<(), CtlError> {
        match self
            .out
            .write_all(text.as_bytes())
            .and_then(|()| self.out.flush())
        {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(CtlError::Output(error)),
            _ => Ok(()),
        }
    }

    /// Writes a line to stderr. There is nowhere to tell of a failure to do so.
    pub(crate) fn progress(&mut self, line: &str) {
        let _ = writeln!(self.err, "{line}");
    }

    /// Whether progress bars can be shown.
    pub(crate) fn shows_bars(&self) -> bool {
        self.bars
    }

    /// Whether a live view can be shown.
    pub(crate) fn is_screen(&self) -> bool {
        self.screen
    }

    /// Whether there is a terminal to ask on.
    pub(crate) fn can_ask(&self) -> bool {
        self.answer.is_some()
    }

    /// Asks a question that only `y` or `yes` affirms.
    pub(crate) fn ask(&mut self, question: &str) -> Result<bool, CtlError> {
        let _ = write!(self.err, "{question} [y/N] ").and_then(|()| self.err.flush());
        let Some(answer) = &mut self.answer else {
            return Ok(false);
        };
        let line = answer().map_err(|error| CtlError::Usage(format!("cannot read your answer: {error}")))?;
        Ok(["y", "yes"].contains(&line.trim().to_ascii_lowercase().as_str()))
    }
}
