//! Stop texts: holds text back as long as it could be the beginning of one.
//!
//! Stop tokens are the engine's.

/// Watches a completion's text for stop texts.
pub struct Stops {
    stops: Vec<String>,
    held: String,
    shown: StopText,
}

/// Whether a stop text that was met is part of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopText {
    /// It is cut off.
    Hidden,
    /// It stands at the end.
    Shown,
}

/// What may be given out.
#[derive(Debug, PartialEq, Eq)]
pub struct Passed {
    /// Text that is certain.
    pub text: String,
    /// The stop text that was met, which ends the completion.
    pub stop: Option<String>,
}

impl Stops {
    /// Watches for these.
    pub fn new(stops: Vec<String>, shown: StopText) -> Stops {
        Stops { stops, held: String::new(), shown }
    }

    /// Adds text.
    pub fn push(&mut self, text: &str) -> Passed {
        self.held.push_str(text);
        let found = |stop: &String| self.held.find(stop.as_str()).map(|at| (at, stop.clone()));
        if let Some((at, stop)) = self.stops.iter().filter_map(found).min_by_key(|(at, _)| *at) {
            let end = if self.shown == StopText::Shown { at + stop.len() } else { at };
            let text = self.held[..end].to_owned();
            self.held.clear();
            return Passed { text, stop: Some(stop) };
        }
        let kept = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let text = self.held.drain(..self.held.len() - kept).collect();
        Passed { text, stop: None }
    }

    /// The rest, when no more text comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// How many bytes at the end of `text` are a beginning of `marker`, but not all of it.
pub fn overlap(text: &str, marker: &str) -> usize {
    let most = text.len().min(marker.len().saturating_sub(1));
    let matches = |count: &usize| {
        marker.is_char_boundary(*count) && text.as_bytes().ends_with(&marker.as_bytes()[..*count])
    };
    (1..=most).rev().find(matches).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_text_in_pieces_is_never_shown() {
        let mut stops = Stops::new(vec!["END".to_owned(), "\n\n".to_owned()], StopText::Hidden);
        let mut text = String::new();
        for piece in ["a E", "N", "E", "N", "D b"] {
            let passed = stops.push(piece);
            text += &passed.text;
            if passed.stop.is_some() {
                assert_eq!(passed.stop.as_deref(), Some("END"));
            }
        }
        assert_eq!(text, "a EN");
    }

    #[test]
    fn held_text_comes_at_the_end_and_shown_stops_stay() {
        let mut stops = Stops::new(vec!["ende".to_owned()], StopText::Shown);
        assert_eq!(stops.push("bitte en"), Passed { text: "bitte ".to_owned(), stop: None });
        assert_eq!(stops.push("den").text, "enden"[..4].to_owned());
        let mut stops = Stops::new(vec!["橋脚".to_owned()], StopText::Hidden);
        assert_eq!(stops.push("a橋").text, "a");
        assert_eq!(stops.finish(), "橋");
    }
}
