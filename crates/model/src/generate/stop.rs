//! Stop strings in streamed text: found across token borders, never shown, not even in part.

/// Holds back what may be the beginning of a stop string.
#[derive(Debug, Clone, Default)]
pub(crate) struct StopFilter {
    stops: Vec<String>,
    held: String,
    hit: bool,
}

impl StopFilter {
    pub(crate) fn new(stops: Vec<String>) -> Self {
        Self {
            stops,
            held: String::new(),
            hit: false,
        }
    }

    /// Adds text; what comes after a stop string is dropped.
    pub(crate) fn push(&mut self, text: &str) {
        if self.hit {
            return;
        }
        self.held.push_str(text);
        if let Some(at) = self
            .stops
            .iter()
            .filter_map(|s| self.held.find(s.as_str()))
            .min()
        {
            self.held.truncate(at);
            self.hit = true;
        }
    }

    /// Whether a stop string came.
    pub(crate) fn hit(&self) -> bool {
        self.hit
    }

    /// Text that can't be part of a stop string any more; all of it if the reply has ended.
    pub(crate) fn take(&mut self, ended: bool) -> String {
        if ended || self.hit {
            return std::mem::take(&mut self.held);
        }
        // The longest end of the text that is the beginning of a stop string.
        let keep = self
            .held
            .char_indices()
            .map(|(i, _)| i)
            .find(|&i| self.stops.iter().any(|s| s.starts_with(&self.held[i..])))
            .unwrap_or(self.held.len());
        let tail = self.held.split_off(keep);
        std::mem::replace(&mut self.held, tail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut filter = StopFilter::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut out = Vec::new();
        for p in pieces {
            filter.push(p);
            out.push(filter.take(false));
        }
        out.push(filter.take(true));
        (out, filter.hit())
    }

    #[test]
    fn a_stop_string_over_three_pieces_is_never_shown() {
        let (out, hit) = run(&["END"], &["a E", "N", "D b"]);
        assert_eq!((out.concat().as_str(), hit), ("a ", true));
        assert_eq!(out[0], "a ");
    }

    #[test]
    fn a_false_start_is_shown_late() {
        let (out, hit) = run(&["END"], &["x E", "N", "Z"]);
        assert_eq!((out.concat().as_str(), hit), ("x ENZ", false));
        assert_eq!(out, ["x ", "", "ENZ", ""]);
    }

    #[test]
    fn the_earliest_of_several_wins() {
        let (out, hit) = run(&["bb", "é"], &["aébb"]);
        assert_eq!((out.concat().as_str(), hit), ("a", true));
    }
}
