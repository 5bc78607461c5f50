//! What a new user sees once everything is up.

use std::{fmt::Write as _, net::SocketAddr, path::Path};

/// Addresses and names that the banner tells.
#[derive(Debug)]
pub(crate) struct Banner<'a> {
    pub(crate) gateway: SocketAddr,
    pub(crate) gateway_ops: SocketAddr,
    pub(crate) control_plane: SocketAddr,
    pub(crate) workers: Vec<SocketAddr>,
    pub(crate) data_dir: &'a Path,
    /// `model@revision`, in the order they were given.
    pub(crate) revisions: Vec<String>,
    /// Rollout in words, where there is one.
    pub(crate) rollout: Option<String>,
    /// How to start this binary again from the same shell.
    pub(crate) program: String,
    /// Addresses differ from the defaults, so the commands must name them.
    pub(crate) explicit: bool,
}

impl Banner<'_> {
    /// The banner, one string with line ends.
    pub(crate) fn render(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let workers: Vec<String> = self.workers.iter().map(ToString::to_string).collect();
        writeln!(out, "\nPenstock is up.\n")?;
        writeln!(
            out,
            "  gateway        http://{}   gRPC and OpenAI HTTP; operations on {}",
            self.gateway, self.gateway_ops
        )?;
        writeln!(out, "  control plane  http://{}   gRPC", self.control_plane)?;
        writeln!(out, "  workers        {}", workers.join(", "))?;
        writeln!(out, "  serving        {}", self.revisions.join(", "))?;
        if let Some(rollout) = &self.rollout {
            writeln!(out, "  rollout        {rollout}")?;
        }
        writeln!(out, "  state          {}", self.data_dir.display())?;
        let model = self
            .revisions
            .first()
            .and_then(|r| r.split('@').next())
            .unwrap_or("demo");
        writeln!(out, "\nTry, from another terminal:\n")?;
        writeln!(
            out,
            "  curl http://{}/v1/chat/completions -H 'content-type: application/json' \\",
            self.gateway
        )?;
        writeln!(
            out,
            "    -d '{{\"model\": \"{model}\", \"temperature\": 0, \"messages\": [{{\"role\": \"user\", \"content\": \"地球的周长是多少?\"}}]}}'"
        )?;
        let ctl = format!("{} ctl", self.program);
        let gateway = if self.explicit {
            format!(" --gateway http://{}", self.gateway)
        } else {
            String::new()
        };
        let control_plane = if self.explicit {
            format!(" --control-plane http://{}", self.control_plane)
        } else {
            String::new()
        };
        writeln!(
            out,
            "  {ctl} generate{gateway} --temperature 0 'How long is the equator?'      # gRPC Generate"
        )?;
        writeln!(out, "  {ctl} rollout set --canary 5%{control_plane}")?;
        writeln!(out, "\nCtrl-C drains and stops.")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_name_addresses_only_where_they_differ_from_the_defaults() {
        let banner = |explicit| Banner {
            gateway: ([127, 0, 0, 1], 8080).into(),
            gateway_ops: ([127, 0, 0, 1], 8081).into(),
            control_plane: ([127, 0, 0, 1], 8090).into(),
            workers: vec![([127, 0, 0, 1], 8100).into()],
            data_dir: Path::new("/data"),
            revisions: vec!["demo@v1".into(), "demo@v2".into()],
            rollout: None,
            program: "./penstock".into(),
            explicit,
        };
        assert!(
            banner(false)
                .render()
                .contains("./penstock ctl rollout set --canary 5%\n")
        );
        assert!(
            banner(true)
                .render()
                .contains("--canary 5% --control-plane http://127.0.0.1:8090\n")
        );
    }
}
