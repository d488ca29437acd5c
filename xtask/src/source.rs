//! A Rust file split into code and comments, so that a rule never trips over a string.
//!
//! This is a scanner, not a parser: it knows comments, strings, characters, lifetimes and matching
//! brackets, which is all the rules need. Read next: `rules.rs`.

use std::ops::Range;

/// A scanned Rust file.
pub struct Source {
    /// The file, relative to the repository's root.
    pub path: String,
    /// The lines as written.
    pub lines: Vec<String>,
    /// The code of each line; comments and the contents of strings are blanks.
    pub code: Vec<String>,
    /// The comment text of each line, with its slashes; empty where there is none.
    pub comments: Vec<String>,
    /// Whether each line belongs to an item under `#[cfg(test)]`, or to a file of tests.
    pub in_test: Vec<bool>,
    /// The code of the whole file: the lines of `code`, each with its line break.
    text: Vec<char>,
    /// Where each line begins in `text`.
    starts: Vec<usize>,
}

/// What the scanner is inside of.
enum State {
    Code,
    LineComment,
    BlockComment { depth: usize },
    Text,
    RawText { hashes: usize },
}

impl Source {
    /// Scans a file.
    pub fn new(path: &str, content: &str) -> Self {
        let (code, comments) = split(content);
        let mut text = Vec::new();
        let mut starts = Vec::new();
        for line in &code {
            starts.push(text.len());
            text.extend(line.chars());
            text.push('\n');
        }
        let lines = content.lines().map(str::to_owned).collect();
        let in_test = vec![is_test_file(path); code.len()];
        let mut source =
            Source { path: path.to_owned(), lines, code, comments, in_test, text, starts };
        source.mark_tests();
        source
    }

    /// The index of the line that holds a position of the code.
    pub fn line_at(&self, position: usize) -> usize {
        self.starts.partition_point(|start| *start <= position) - 1
    }

    /// Where a word stands in the code, as a whole word.
    pub fn words(&self, word: &str) -> Vec<usize> {
        let word: Vec<char> = word.chars().collect();
        let found = |at: &usize| {
            self.text[*at..].starts_with(&word)
                && (*at == 0 || !is_word(self.text[at - 1]))
                && !self.text.get(at + word.len()).copied().is_some_and(is_word)
        };
        (0..self.text.len()).filter(found).collect()
    }

    /// Where a piece of code stands, blanks and line breaks inside it not counted.
    pub fn pieces(&self, piece: &str) -> Vec<usize> {
        let piece: Vec<char> = piece.chars().collect();
        let matches = |start: usize| {
            let mut solid = (start..self.text.len()).filter(|at| !self.text[*at].is_whitespace());
            piece.iter().all(|want| solid.next().is_some_and(|at| self.text[at] == *want))
        };
        (0..self.text.len())
            .filter(|start| self.text[*start] == piece[0] && matches(*start))
            .collect()
    }

    /// The first solid character at or after a position.
    pub fn solid_after(&self, position: usize) -> Option<char> {
        self.text[position.min(self.text.len())..].iter().copied().find(|c| !c.is_whitespace())
    }

    /// The word that follows a position, blanks skipped.
    pub fn word_after(&self, position: usize) -> String {
        let rest = self.text[position.min(self.text.len())..].iter();
        rest.skip_while(|c| c.is_whitespace()).take_while(|c| is_word(**c)).collect()
    }

    /// The body of the item that begins at a position: from its brace to the matching one.
    /// Nothing where the item ends with a semicolon.
    pub fn body_after(&self, position: usize) -> Option<Range<usize>> {
        let mut depth = 0_i32;
        for at in position..self.text.len() {
            match self.text[at] {
                '(' | '[' => depth += 1,
                ')' | ']' => depth -= 1,
                ';' if depth <= 0 => return None,
                '{' if depth <= 0 => return self.closing(at).map(|end| at..end),
                _ => {}
            }
        }
        None
    }

    /// The text between a bracket and the one that closes it.
    pub fn inside(&self, opening: usize) -> String {
        let end = self.closing(opening).unwrap_or(self.text.len());
        self.text[opening..end].iter().collect()
    }

    /// Where the bracket at `opening` closes.
    fn closing(&self, opening: usize) -> Option<usize> {
        let mut depth = 0_i32;
        for at in opening..self.text.len() {
            match self.text[at] {
                '(' | '[' | '{' => depth += 1,
                ')' | ']' | '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                return Some(at);
            }
        }
        None
    }

    fn mark_tests(&mut self) {
        if !self.pieces("#![cfg(test)]").is_empty() {
            self.in_test.fill(true);
            return;
        }
        for piece in ["#[cfg(test)]", "#[cfg(all(test,"] {
            for start in self.pieces(piece) {
                let attribute_end = self.closing(start + 1).unwrap_or(start);
                let first = self.line_at(start);
                let last = match self.body_after(attribute_end + 1) {
                    Some(body) => self.line_at(body.end),
                    None => first,
                };
                self.in_test[first..=last].fill(true);
            }
        }
    }
}

fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// Whether all of a file is test code.
fn is_test_file(path: &str) -> bool {
    let folders = ["tests/", "benches/", "examples/"];
    let inside = |folder: &str| path.starts_with(folder) || path.contains(&format!("/{folder}"));
    folders.iter().any(|folder| inside(folder)) || path.ends_with("/tests.rs")
}

/// Splits a file into the code and the comment text of each line.
fn split(content: &str) -> (Vec<String>, Vec<String>) {
    let (mut code, mut comments) = (Vec::new(), Vec::new());
    let mut state = State::Code;
    for line in content.lines() {
        let characters: Vec<char> = line.chars().collect();
        let mut split = Split { code: String::new(), comment: String::new() };
        let mut at = 0;
        while at < characters.len() {
            let (next, taken) = split.step(state, &characters, at);
            state = next;
            at += taken;
        }
        if matches!(state, State::LineComment) {
            state = State::Code;
        }
        code.push(split.code);
        comments.push(split.comment);
    }
    (code, comments)
}

/// One line being split.
struct Split {
    code: String,
    comment: String,
}

impl Split {
    /// Takes one or more characters; returns the new state and how many were taken.
    fn step(&mut self, state: State, line: &[char], at: usize) -> (State, usize) {
        let pair = (line[at], line.get(at + 1).copied());
        match state {
            State::Code => self.code_step(line, at),
            State::LineComment => {
                self.comment.push(line[at]);
                (State::LineComment, 1)
            }
            State::BlockComment { depth } => match pair {
                ('*', Some('/')) if depth == 1 => (State::Code, 2),
                ('*', Some('/')) => (State::BlockComment { depth: depth - 1 }, 2),
                ('/', Some('*')) => (State::BlockComment { depth: depth + 1 }, 2),
                _ => {
                    self.comment.push(line[at]);
                    (State::BlockComment { depth }, 1)
                }
            },
            State::Text => match pair {
                ('\\', Some(_)) => self.blank(State::Text, 2),
                ('"', _) => self.keep(State::Code, '"'),
                _ => self.blank(State::Text, 1),
            },
            State::RawText { hashes } => {
                let closes = line[at] == '"' && count_hashes(&line[at + 1..]) >= hashes;
                if closes {
                    self.blank(State::Code, 1 + hashes)
                } else {
                    self.blank(State::RawText { hashes }, 1)
                }
            }
        }
    }

    fn code_step(&mut self, line: &[char], at: usize) -> (State, usize) {
        let next = line.get(at + 1).copied();
        let after_word = at > 0 && is_word(line[at - 1]);
        match line[at] {
            '/' if next == Some('/') => {
                self.comment.push_str("//");
                (State::LineComment, 2)
            }
            '/' if next == Some('*') => (State::BlockComment { depth: 1 }, 2),
            '"' => self.keep(State::Text, '"'),
            'r' if !after_word || matches!(line[at - 1], 'b' | 'c') => {
                let hashes = count_hashes(&line[at + 1..]);
                if line.get(at + 1 + hashes) == Some(&'"') {
                    self.blank(State::RawText { hashes }, 2 + hashes)
                } else {
                    self.keep(State::Code, 'r')
                }
            }
            '\'' if next == Some('\\') => {
                // The escaped character itself may be a quote, so the search begins after it.
                let rest = line.get(at + 3..).unwrap_or_default();
                let length = rest.iter().position(|c| *c == '\'').unwrap_or(rest.len());
                self.blank(State::Code, (length + 4).min(line.len() - at))
            }
            '\'' if line.get(at + 2) == Some(&'\'') => self.blank(State::Code, 3),
            other => self.keep(State::Code, other),
        }
    }

    fn keep(&mut self, state: State, character: char) -> (State, usize) {
        self.code.push(character);
        (state, 1)
    }

    fn blank(&mut self, state: State, count: usize) -> (State, usize) {
        self.code.extend(std::iter::repeat_n(' ', count));
        (state, count)
    }
}

fn count_hashes(rest: &[char]) -> usize {
    rest.iter().take_while(|c| **c == '#').count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_and_comments_are_no_code() {
        let source = Source::new("a.rs", "let a = \"fn { // no\"; // fn yes {\nlet b = 'x';\n");
        assert_eq!(source.code[0].trim_end(), "let a = \"          \";");
        assert_eq!(source.comments[0], "// fn yes {");
        assert!(source.words("fn").is_empty());
    }

    #[test]
    fn raw_strings_escapes_lifetimes_and_nested_comments_end_where_they_should() {
        let text = "let a = r#\"x \" { \"#; let b = '\\''; let c = '{';\n\
                    fn f<'a>(x: &'a str) {} /* one /* two */ still */ struct S;\n\
                    let many = \"line\n fn inside {\n\"; fn outside() {}\n";
        let source = Source::new("a.rs", text);
        assert!(!source.code[0].contains('{') && source.code[0].contains("let c"));
        assert!(source.code[1].contains("struct S;") && !source.code[1].contains("still"));
        assert_eq!(source.words("fn").len(), 2);
    }

    #[test]
    fn the_test_module_is_marked_and_the_code_after_it_is_not() {
        let text = "fn a() {}\n#[cfg(test)]\nmod tests {\n    fn b() {}\n}\nfn c() {}\n";
        let source = Source::new("a.rs", text);
        assert_eq!(source.in_test, [false, true, true, true, true, false]);
        assert!(Source::new("crates/a/tests/x.rs", "fn a() {}\n").in_test[0]);
        assert!(Source::new("a.rs", "fn a() {}\n#![cfg(test)]\n").in_test[0]);
    }

    #[test]
    fn a_body_ends_at_its_matching_brace() {
        let source = Source::new("a.rs", "fn a(x: [u8; 2]) -> u8 {\n    { 1 }\n}\nfn b();\n");
        let body = source.body_after(0).expect("the function has a body");
        assert_eq!((source.line_at(body.start), source.line_at(body.end)), (0, 2));
        assert!(source.body_after(source.words("fn")[1]).is_none());
    }
}
