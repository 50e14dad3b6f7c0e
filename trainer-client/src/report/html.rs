//! Text to HTML, and numbers to text for people.

/// Colours that lines, and what belongs to them, are told apart by.
pub(super) const PALETTE: usize = 8;

/// A page under construction.
#[derive(Debug, Default)]
pub(super) struct Html(String);

impl Html {
    /// Adds markup; whatever came from outside must have gone through [`escape`].
    pub fn push(&mut self, markup: &str) {
        self.0.push_str(markup);
        self.0.push('\n');
    }

    /// Begins a section with one sentence on how to read it, itself markup.
    pub fn section(&mut self, title: &str, how_to_read: &str) {
        self.push(&format!("<section><h2>{}</h2><p class=\"how\">{how_to_read}</p>", escape(title)));
    }

    pub fn into_string(self) -> String {
        self.0
    }
}

/// Makes a text safe between tags and in quoted attributes.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // Control characters are not allowed in HTML; tab and line feed are.
            control if control.is_control() && control != '\t' && control != '\n' => escaped.push('\u{fffd}'),
            other => escaped.push(other),
        }
    }
    escaped
}

/// `1234567` as `1.23M`.
pub(super) fn count(number: f64) -> String {
    for (unit, letter) in [(1e9, "G"), (1e6, "M"), (1e3, "k")] {
        if number >= unit {
            let scaled = number / unit;
            let decimals = if scaled < 10.0 { 2 } else { usize::from(scaled < 100.0) };
            let text = format!("{scaled:.decimals$}");
            let text =
                if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
            return format!("{text}{letter}");
        }
    }
    format!("{number:.0}")
}

/// A wall time in seconds as `1 min 05 s`.
pub(super) fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, _) => format!("{seconds:.1} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds:02} s"),
        (hours, minutes, _) => format!("{hours} h {minutes:02} min"),
    }
}

/// A share as `61 %`.
pub(super) fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::{count, duration, escape, percent};

    #[test]
    fn nothing_of_a_text_is_read_as_markup() {
        assert_eq!(escape("<b title=\"x\">'&\u{1}"), "&lt;b title=&quot;x&quot;&gt;&#39;&amp;\u{fffd}");
    }

    #[test]
    fn numbers_are_short() {
        let counts: Vec<String> = [0.0, 999.0, 1000.0, 1234.0, 20_000.0, 409_600.0, 1.5e9].map(count).into();
        assert_eq!(counts, ["0", "999", "1k", "1.23k", "20k", "410k", "1.5G"]);
        assert_eq!([duration(3.21), duration(65.0), duration(3700.0)], ["3.2 s", "1 min 05 s", "1 h 01 min"]);
        assert_eq!(percent(0.604), "60 %");
    }
}
