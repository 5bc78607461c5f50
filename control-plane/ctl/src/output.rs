//! Data as a table, JSON or YAML.

use crate::{console::Console, error::CtlError};
use serde::Serialize;
use std::time::Duration;

/// How data is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// For a reader.
    #[default]
    Table,
    /// For a program.
    Json,
    /// For a file.
    Yaml,
}

/// What a command answers: serialised for programs, a table for readers.
pub(crate) trait View: Serialize {
    /// The text of a table, with its last newline.
    fn table(&self) -> String;
}

/// Writes an answer.
pub(crate) fn emit(console: &mut Console, format: Format, view: &impl View) -> Result<(), CtlError> {
    let text = match format {
        Format::Table => view.table(),
        Format::Json => json(serde_json::to_string_pretty(view))?,
        Format::Yaml => yaml(view)?,
    };
    console.data(&text)
}

/// Writes one of many answers: one line of JSON, one document of YAML.
pub(crate) fn emit_next(console: &mut Console, format: Format, view: &impl View) -> Result<(), CtlError> {
    let text = match format {
        Format::Table => view.table(),
        Format::Json => json(serde_json::to_string(view))?,
        Format::Yaml => format!("---\n{}", yaml(view)?),
    };
    console.data(&text)
}

fn json(text: serde_json::Result<String>) -> Result<String, CtlError> {
    let text = text.map_err(|error| CtlError::Encode {
        format: "JSON",
        reason: error.to_string(),
    })?;
    Ok(text + "\n")
}

fn yaml(view: &impl Serialize) -> Result<String, CtlError> {
    serde_norway::to_string(view).map_err(|error| CtlError::Encode {
        format: "YAML",
        reason: error.to_string(),
    })
}

/// Columns under their titles, two spaces apart.
pub(crate) fn columns<const N: usize>(titles: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = titles.map(width);
    for row in rows {
        for (column, cell) in widths.iter_mut().zip(row) {
            *column = (*column).max(width(cell));
        }
    }
    let line = |cells: [&str; N]| {
        let padded = cells
            .iter()
            .zip(widths)
            .map(|(cell, w)| format!("{cell}{}", " ".repeat(w - width(cell))));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    let rows = rows.iter().map(|row| line(row.each_ref().map(String::as_str)));
    std::iter::once(line(titles)).chain(rows).collect()
}

/// Names and values, one a line; pairs without a value are left out.
pub(crate) fn pairs(pairs: &[(&str, String)]) -> String {
    let widest = pairs
        .iter()
        .map(|(name, _)| width(name))
        .max()
        .unwrap_or_default();
    pairs
        .iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| format!("{name:widest$}  {value}\n"))
        .collect()
}

/// Characters, which is what a terminal shows for everything that names here are made of.
fn width(text: &str) -> usize {
    text.chars().count()
}

/// `34 ms` or `2.5 s`.
pub(crate) fn time(duration: Duration) -> String {
    match duration.as_millis() {
        millis @ 0..1000 => format!("{millis} ms"),
        _ => format!("{:.1} s", duration.as_secs_f64()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_lines_end_without_blanks() {
        let rows = [
            ["a".to_owned(), "é-long".to_owned(), String::new()],
            ["bb".into(), "c".into(), "d".into()],
        ];
        assert_eq!(
            columns(["ID", "NAME", "X"], &rows),
            "ID  NAME    X\na   é-long\nbb  c       d\n"
        );
    }

    #[test]
    fn an_empty_table_still_has_its_titles() {
        assert_eq!(columns(["ID", "NAME"], &[]), "ID  NAME\n");
    }

    #[test]
    fn pairs_leave_out_what_has_no_value() {
        let text = pairs(&[
            ("model", "demo".into()),
            ("reason", String::new()),
            ("epoch", "3".into()),
        ]);
        assert_eq!(text, "model   demo\nepoch   3\n");
    }

    #[test]
    fn times_read_as_an_operator_says_them() {
        assert_eq!(time(Duration::from_micros(34_400)), "34 ms");
        assert_eq!(time(Duration::from_millis(2_540)), "2.5 s");
    }
}
