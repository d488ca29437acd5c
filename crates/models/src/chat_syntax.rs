//! Rewrites the one tag of transformers' templates that Jinja does not know.
//!
//! `{% generation %}` marks what an assistant wrote, for masks in training. The renderer has no
//! custom tags, so the pair becomes an `if` that always holds: a block tag like the original, so
//! that whitespace is trimmed around it in the same way. Does not parse templates otherwise.

/// The template with `generation` blocks as `if true` blocks; lines keep their numbers.
pub(crate) fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let close = match rest.as_bytes().get(1) {
            Some(b'%') => "%}",
            Some(b'#') => "#}",
            Some(b'{') => "}}",
            _ => {
                out.push('{');
                rest = &rest[1..];
                continue;
            }
        };
        let end = end_of(rest, close);
        let tag = &rest[..end];
        let block = close == "%}" && tag.ends_with(close);
        out.push_str(&if block { rewritten(tag) } else { tag.to_owned() });
        rest = &rest[end..];
    }
    out + rest
}

/// Where the construct that `text` starts with ends, not counting ends inside quotes.
fn end_of(text: &str, close: &str) -> usize {
    let mut quote = None;
    let mut escaped = false;
    for (at, character) in text.char_indices().skip(2) {
        match (quote, character) {
            _ if escaped => escaped = false,
            (Some(_), '\\') => escaped = true,
            (Some(open), _) if open == character => quote = None,
            (Some(_), _) => {}
            // In a comment a quote is an apostrophe.
            (None, '"' | '\'') if close != "#}" => quote = Some(character),
            _ if text[at..].starts_with(close) => return at + close.len(),
            _ => {}
        }
    }
    text.len()
}

fn rewritten(tag: &str) -> String {
    let inner = tag.trim_start_matches("{%").trim_end_matches("%}");
    let word = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
    match word {
        "generation" => tag.replacen("generation", "if true", 1),
        "endgeneration" => tag.replacen("endgeneration", "endif", 1),
        _ => tag.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_tag_itself_is_rewritten() {
        for (source, want) in [
            ("a{% generation %}b{%- endgeneration -%}c", "a{% if true %}b{%- endif -%}c"),
            ("{%generation%}x{%endgeneration%}", "{%if true%}x{%endif%}"),
            ("{{ '{% generation %}' }}", "{{ '{% generation %}' }}"),
            ("{# don't: {% generation %} #}{", "{# don't: {% generation %} #}{"),
            ("{% set generation = 1 %}", "{% set generation = 1 %}"),
            ("{% if a == '%}' %}{% generation", "{% if a == '%}' %}{% generation"),
            ("é{", "é{"),
        ] {
            assert_eq!(without_generation_tags(source), want);
        }
    }
}
