//! A real browser: headless Chromium, driven through chromedriver by WebDriver, its standard protocol.

use crate::{Process, Reply, eventually, free_ports, get, post_json};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::{
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

/// How long a page may take to become what a test waits for.
const PATIENCE: Duration = Duration::from_secs(15);

/// One browser window. Whatever its page logs and requests is recorded from the start.
#[derive(Debug)]
pub struct Browser {
    // Declared for its drop: the driver must outlive the session that it ends.
    _driver: Process,
    session: String,
}

impl Browser {
    /// Starts the driver and a window of `width` by `height` pixels.
    pub async fn start(directory: &Path, width: u32, height: u32) -> Result<Self> {
        let [port] = free_ports()?;
        let mut command = Command::new("chromedriver");
        command.arg(format!("--port={port}"));
        let mut driver = Process::start("chromedriver", command, directory)
            .context("chromedriver is needed (Debian: apt-get install chromium-driver)")?;
        let base = format!("http://127.0.0.1:{port}");
        driver.ready(&format!("{base}/status"), PATIENCE).await?;
        let profile = directory.join("chromium");
        let capabilities = json!({
            "goog:chromeOptions": { "args": [
                "--headless=new",
                // The tests run as root in a container, where Chromium's sandbox refuses to start.
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-proxy-server",
                format!("--user-data-dir={}", profile.display()),
                format!("--window-size={width},{height}"),
            ] },
            "goog:loggingPrefs": { "browser": "ALL", "performance": "ALL" },
        });
        let wanted = json!({ "capabilities": { "alwaysMatch": capabilities } });
        let created = value(&post_json(&format!("{base}/session"), &wanted).await?)?;
        let id = created["sessionId"].as_str().context("a session without an id")?;
        let browser = Self {
            _driver: driver,
            session: format!("{base}/session/{id}"),
        };
        // Chromium opens its own start page, whose requests are no page's of the test.
        browser.open("about:blank").await?;
        browser.requests().await?;
        Ok(browser)
    }

    /// Opens a page.
    pub async fn open(&self, url: &str) -> Result<()> {
        self.post("url", json!({ "url": url })).await?;
        Ok(())
    }

    /// Runs a function body in the page and returns what it returns.
    pub async fn run(&self, script: &str) -> Result<Value> {
        self.post("execute/sync", json!({ "script": script, "args": [] }))
            .await
    }

    /// Text of the first element that a CSS selector finds, as a user sees it.
    pub async fn text(&self, selector: &str) -> Result<String> {
        let element = self.find(selector).await?;
        let text = value(&get(&format!("{}/element/{element}/text", self.session)).await?)?;
        Ok(text.as_str().unwrap_or_default().to_owned())
    }

    /// Waits until the text of an element satisfies `wanted`, and returns it.
    pub async fn wait_for(&self, selector: &str, wanted: impl Fn(&str) -> bool) -> Result<String> {
        let check = || async {
            let text = self.text(selector).await?;
            ensure!(wanted(&text), "{selector} shows {text:?}");
            Ok(Some(text))
        };
        eventually(&format!("the text of {selector}"), PATIENCE, check).await
    }

    /// Clicks an element as soon as it can be clicked.
    pub async fn click(&self, selector: &str) -> Result<()> {
        let press = || async {
            let element = self.find(selector).await?;
            self.post(&format!("element/{element}/click"), json!({})).await?;
            Ok(Some(()))
        };
        eventually(&format!("a click on {selector}"), PATIENCE, press).await
    }

    /// Types into an element.
    pub async fn write(&self, selector: &str, text: &str) -> Result<()> {
        let element = self.find(selector).await?;
        self.post(&format!("element/{element}/value"), json!({ "text": text }))
            .await?;
        Ok(())
    }

    /// Makes the window as small as a telephone's screen, 390 by 844 pixels.
    pub async fn phone(&self) -> Result<()> {
        let params = json!({ "width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": true });
        let command = json!({ "cmd": "Emulation.setDeviceMetricsOverride", "params": params });
        self.post("goog/cdp/execute", command).await?;
        Ok(())
    }

    /// Saves a picture of the window as PNG.
    pub async fn screenshot(&self, path: &Path) -> Result<()> {
        let picture = value(&get(&format!("{}/screenshot", self.session)).await?)?;
        let encoded = path.with_extension("base64");
        std::fs::write(&encoded, picture.as_str().context("a picture is text")?)?;
        let decoded = Command::new("base64").arg("--decode").arg(&encoded).output()?;
        ensure!(decoded.status.success(), "the picture is not base64");
        std::fs::remove_file(encoded)?;
        Ok(std::fs::write(path, decoded.stdout)?)
    }

    /// What the page has written to its console since the last call: errors, and what it was refused.
    pub async fn console(&self) -> Result<Vec<String>> {
        let entries = self.post("se/log", json!({ "type": "browser" })).await?;
        let entries = entries.as_array().context("a log is a list")?;
        Ok(entries.iter().map(ToString::to_string).collect())
    }

    /// Addresses that the page has requested since the last call.
    pub async fn requests(&self) -> Result<Vec<String>> {
        let entries = self.post("se/log", json!({ "type": "performance" })).await?;
        let entries = entries.as_array().context("a log is a list")?;
        let mut urls = Vec::new();
        for entry in entries {
            let event: Value = serde_json::from_str(entry["message"].as_str().unwrap_or_default())?;
            let event = &event["message"];
            if event["method"] == "Network.requestWillBeSent" {
                let url = &event["params"]["request"]["url"];
                urls.push(url.as_str().context("a request has a URL")?.to_owned());
            }
        }
        Ok(urls)
    }

    async fn find(&self, selector: &str) -> Result<String> {
        let by = json!({ "using": "css selector", "value": selector });
        let found = self.post("element", by).await?;
        let reference = found.as_object().and_then(|element| element.values().next());
        let reference = reference.and_then(Value::as_str);
        Ok(reference.context("an element without a reference")?.to_owned())
    }

    async fn post(&self, command: &str, body: Value) -> Result<Value> {
        value(&post_json(&format!("{}/{command}", self.session), &body).await?)
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The browser is the driver's child, not ours: killing the driver alone would leave it behind.
        let _ = Command::new("curl")
            .args([
                "-s",
                "-X",
                "DELETE",
                "--noproxy",
                "*",
                "--max-time",
                "5",
                &self.session,
            ])
            .stdout(Stdio::null())
            .status();
    }
}

/// The value of an answer, or the error that it tells.
fn value(reply: &Reply) -> Result<Value> {
    let mut answer = reply.json()?;
    let value = answer["value"].take();
    ensure!(
        reply.status == 200,
        "WebDriver: {}: {}",
        value["error"].as_str().unwrap_or_default(),
        value["message"].as_str().unwrap_or_default()
    );
    Ok(value)
}
