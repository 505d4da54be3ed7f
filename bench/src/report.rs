//! What a benchmark leaves behind: `NAME.json` with everything, `NAME.md` with tables, and plots.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::error::Error;

mod machine;
mod plot;

pub use machine::Machine;
pub use plot::{Plot, Scale, Series};

/// A table, in words.
#[derive(Debug, Clone, Default)]
pub struct Table {
    /// What it shows.
    pub title: String,
    /// Heads of the columns.
    pub columns: Vec<String>,
    /// Cells.
    pub rows: Vec<Vec<String>>,
}

/// See the module's text.
#[derive(Debug)]
pub struct Report {
    /// Part of the files' names.
    pub name: &'static str,
    /// What was measured, in a sentence or two.
    pub about: String,
    /// The command that repeats it.
    pub repeat: String,
    /// On what it was measured.
    pub machine: Machine,
    /// Rows, each an object.
    pub rows: Vec<Value>,
    /// What concerns no single row.
    pub other: Map<String, Value>,
    /// Text that is laid out already.
    pub text: String,
    /// For people.
    pub tables: Vec<Table>,
    /// For people who look.
    pub plots: Vec<Plot>,
}

impl Report {
    /// An empty report of this machine.
    #[must_use]
    pub fn new(name: &'static str, about: String, repeat: String) -> Self {
        let (rows, tables, plots) = (Vec::new(), Vec::new(), Vec::new());
        let (machine, other, text) = (Machine::this_one(), Map::new(), String::new());
        Self { name, about, repeat, machine, rows, other, text, tables, plots }
    }

    /// Adds a row to the JSON document. It says itself where it comes from.
    ///
    /// # Errors
    /// If it cannot be written as JSON.
    pub fn add_row(&mut self, row: &impl Serialize) -> Result<(), Error> {
        let mut row = json_of(row)?;
        if let Value::Object(fields) = &mut row {
            fields.insert("machine".to_owned(), json_of(&self.machine)?);
            fields.insert("repeat".to_owned(), Value::String(self.repeat.clone()));
        }
        self.rows.push(row);
        Ok(())
    }

    /// Writes all files; their paths.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn write(&self, directory: &Path) -> Result<Vec<PathBuf>, Error> {
        fs::create_dir_all(directory).map_err(|error| unwritten(directory, &error))?;
        let document = json!({
            "name": self.name, "about": self.about, "repeat": self.repeat, "machine": json_of(&self.machine)?,
            "rows": self.rows, "other": self.other,
        });
        let mut files = vec![
            (format!("{}.json", self.name), format!("{document:#}\n")),
            (format!("{}.md", self.name), self.markdown()),
        ];
        for plot in &self.plots {
            files.push((format!("{}-{}.svg", self.name, plot.name), plot.svg()?));
        }
        let write = |(name, text): (String, String)| {
            let path = directory.join(name);
            fs::write(&path, text).map_err(|error| unwritten(&path, &error)).map(|()| path)
        };
        files.into_iter().map(write).collect()
    }

    /// The tables, with all that a reader has to know about them.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text = format!("{}\n\nMeasured on: {}. Again: `{}`\n", self.about, self.machine, self.repeat);
        if !self.text.is_empty() {
            text.push_str(&format!("\n```text\n{}\n```\n", self.text.trim_end()));
        }
        for table in &self.tables {
            text.push_str(&format!("\n{}\n\n", table.title));
            let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
            text.push_str(&line(&table.columns));
            text.push_str(&line(&vec!["---".to_owned(); table.columns.len()]));
            for row in &table.rows {
                text.push_str(&line(row));
            }
        }
        text
    }
}

fn json_of(value: &impl Serialize) -> Result<Value, Error> {
    serde_json::to_value(value).map_err(|error| Error::Usage(format!("not to be written as JSON: {error}")))
}

fn unwritten(path: &Path, error: &std::io::Error) -> Error {
    Error::Usage(format!("cannot write {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_says_on_what_it_was_measured_and_how_to_repeat_it() {
        let mut report = Report::new("it", "A thing.".to_owned(), "do it again".to_owned());
        report.add_row(&json!({ "iops": 7 })).unwrap();
        let row = &report.rows[0];
        assert_eq!((&row["iops"], &row["repeat"]), (&json!(7), &json!("do it again")));
        assert!(row["machine"]["cores"].as_u64().unwrap() >= 1 && row["machine"]["kvm"].is_boolean());
    }

    #[test]
    fn tables_are_markdown_and_all_files_are_written() {
        let mut report = Report::new("it", "A thing.".to_owned(), "do it again".to_owned());
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        report.tables.push(Table {
            title: "Both:".to_owned(),
            columns: words(&["a", "b"]),
            rows: vec![words(&["1", "2"])],
        });
        report.plots.push(Plot {
            name: "plot".to_owned(),
            title: "<Plot>".to_owned(),
            x: "depth".to_owned(),
            y: "IOPS".to_owned(),
            scale: Scale::Logarithmic,
            series: vec![Series { name: "one".to_owned(), points: vec![(1.0, 10.0), (128.0, 1000.0)] }],
        });
        let directory = tempfile::tempdir().unwrap();
        let files = report.write(&directory.path().join("deeper")).unwrap();
        let texts: Vec<_> = files.iter().map(|path| fs::read_to_string(path).unwrap()).collect();
        assert!(texts[1].ends_with("Both:\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n"), "{}", texts[1]);
        assert!(texts[2].starts_with("<svg ") && texts[2].contains("&lt;Plot&gt;") && texts[2].contains("<polyline"));
    }
}
