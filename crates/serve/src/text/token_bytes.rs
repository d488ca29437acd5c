//! The bytes of single tokens, which are not always whole characters.
//!
//! Byte-level tokenizers spell each byte as one printable character, others spell bytes as
//! `<0x0A>` and spaces as `▁`. Text of whole completions is decoded by the tokenizer itself.

use pontoon_models::{SpecialTokens, Tokenizer};

/// The bytes of every token of a tokenizer.
pub struct TokenBytes {
    bytes: Vec<Vec<u8>>,
}

impl TokenBytes {
    /// Looks at every token once.
    pub fn new(tokenizer: &Tokenizer) -> TokenBytes {
        let alphabet = byte_alphabet();
        // A byte-level vocabulary spells a space as this character; no other one does.
        let byte_level = tokenizer.token_id("Ġ").is_some() || tokenizer.token_id("Ċ").is_some();
        let count = tokenizer.vocab_size() as u32;
        let bytes = |id: u32| {
            let Some(name) = tokenizer.token_name(id) else { return Vec::new() };
            if byte_level {
                let each = |c: char| alphabet.iter().position(|&of| of == c).map(|at| at as u8);
                return name
                    .chars()
                    .map(each)
                    .collect::<Option<_>>()
                    .unwrap_or_else(|| name.into());
            }
            let hex = name.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
            if let Some(byte) = hex.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
                return vec![byte];
            }
            name.replace('▁', " ").into_bytes()
        };
        TokenBytes { bytes: (0..count).map(bytes).collect() }
    }

    /// A token's bytes; none for an id that does not exist.
    pub fn of(&self, token: u32) -> &[u8] {
        self.bytes.get(token as usize).map_or(&[], Vec::as_slice)
    }

    /// A token's text as clients see it; one that is no text is told by its bytes.
    pub fn text(&self, tokenizer: &Tokenizer, token: u32) -> String {
        let bytes = self.of(token);
        match std::str::from_utf8(bytes) {
            Ok(_) => tokenizer.decode(&[token], SpecialTokens::Show).unwrap_or_default(),
            Err(_) => {
                let hex: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
                format!("bytes:{hex}")
            }
        }
    }
}

/// How byte-level tokenizers spell each byte: printable ones as themselves, the others as the
/// characters from 256 on.
fn byte_alphabet() -> Vec<char> {
    let mut next = 256_u32;
    let spell = |byte: u8| {
        if matches!(byte, 33..=126 | 161..=172 | 174..=255) {
            return char::from(byte);
        }
        next += 1;
        char::from_u32(next - 1).expect("the first characters after 255 are all letters")
    };
    (0..=255_u8).map(spell).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spaces_and_newlines_have_their_published_spelling() {
        let alphabet = byte_alphabet();
        assert_eq!(alphabet[usize::from(b' ')], 'Ġ');
        assert_eq!(alphabet[usize::from(b'\n')], 'Ċ');
        assert_eq!(alphabet[usize::from(b'a')], 'a');
        let mut sorted = alphabet.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), 256);
    }
}
