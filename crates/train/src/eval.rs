//! Problems with answers that can be checked, and how an answer is read from a reply.
//!
//! Generates nothing with a model: the caller does. Read next: `arithmetic.rs`, a task that makes
//! its own problems.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::TrainError;

/// One problem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What is asked.
    #[serde(alias = "question")]
    pub prompt: String,
    /// The only right answer.
    pub answer: String,
}

/// Reads problems, one JSON object with `prompt` and `answer` a line.
pub fn read_problems(path: &Path) -> Result<Vec<Problem>, TrainError> {
    let wrong = |what: String| TrainError::Config { origin: path.display().to_string(), what };
    let text = std::fs::read_to_string(path)
        .map_err(|source| TrainError::ReadFile { path: path.to_owned(), source })?;
    let mut problems = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        problems.push(serde_json::from_str(line).map_err(|error| {
            wrong(format!(
                "line {}: {error}; each line is {{\"prompt\": ..., \"answer\": ...}}",
                index + 1
            ))
        })?);
    }
    match problems.is_empty() {
        true => Err(wrong("holds no problem".to_owned())),
        false => Ok(problems),
    }
}

/// The answer in a reply: what follows the reasoning, without space around it.
pub fn answer_of(reply: &str) -> &str {
    let after = reply.rsplit_once("</think>").map_or(reply, |(_, after)| after);
    after.trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_what_follows_the_reasoning() {
        assert_eq!(answer_of("<think>1+1=2</think> 2\n"), "2");
        assert_eq!(answer_of(" 2 "), "2");
        assert_eq!(answer_of("<think>no end 2"), "<think>no end 2");
    }

    #[test]
    fn a_broken_line_of_problems_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.jsonl");
        std::fs::write(&path, "{\"question\": \"1+1?\", \"answer\": \"2\"}\n{\"x\": 1}\n").unwrap();
        let error = read_problems(&path).unwrap_err().to_string();
        assert!(error.contains("p.jsonl") && error.contains("line 2"), "{error}");
    }
}
