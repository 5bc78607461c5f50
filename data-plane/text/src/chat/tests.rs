use super::*;
use serde_json::json;

fn messages(pairs: &[(&str, &str)]) -> Vec<Message> {
    pairs
        .iter()
        .map(|(role, content)| Message {
            role: (*role).into(),
            content: (*content).into(),
        })
        .collect()
}

fn render(source: &str, pairs: &[(&str, &str)]) -> Result<String, TextError> {
    let tokens = vec![
        ("bos_token", "<s>".to_string()),
        ("eos_token", "</s>".to_string()),
    ];
    ChatTemplate::new(source, tokens)
        .unwrap()
        .render(&messages(pairs), true)
}

fn dir(config: serde_json::Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    dir
}

const CHATML: &str = "\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'].strip() + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
";

#[test]
fn chatml_is_rendered_to_the_byte() {
    let text = render(
        CHATML,
        &[("system", "Be brief."), ("user", " 地球的周长是多少? ")],
    )
    .unwrap();
    assert_eq!(
        text,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n地球的周长是多少?<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn lines_of_blocks_leave_nothing_behind() {
    let source = "{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m.content }}]\n  {% endif %}\n{% endfor %}\nend\n";
    assert_eq!(
        render(source, &[("user", "a"), ("system", "x"), ("user", "b")]).unwrap(),
        "[a]\n[b]\nend"
    );
}

#[test]
fn special_tokens_and_absent_tools_are_there() {
    let source =
        "{{ bos_token }}{% if tools is not none %}T{% endif %}{% if documents %}D{% endif %}{{ eos_token }}";
    assert_eq!(render(source, &[]).unwrap(), "<s></s>");
}

#[test]
fn strings_are_iterable_and_none_is_not() {
    let source =
        "{{ tools is iterable }} {{ 'a' is iterable }} {{ messages is iterable }} {{ 1 is iterable }}";
    assert_eq!(render(source, &[]).unwrap(), "False True True False");
}

#[test]
fn raise_exception_reaches_the_sender_in_its_own_words() {
    let source =
        "{% if messages[0].role != 'user' %}{{ raise_exception('roles must begin with user') }}{% endif %}";
    let error = render(source, &[("assistant", "hi")]).unwrap_err().to_string();
    assert_eq!(
        error,
        "the chat template refused the messages: roles must begin with user"
    );
}

#[test]
fn tojson_writes_what_python_writes() {
    let source = "{{ messages[0] | tojson }}|{{ [1, none] | tojson(indent=1) }}|{{ '<b>' | tojson(ensure_ascii=false) }}";
    assert_eq!(
        render(source, &[("user", "it's <地>")]).unwrap(),
        "{\"role\": \"user\", \"content\": \"it's <地>\"}|[\n 1,\n null\n]|\"<b>\""
    );
}

#[test]
fn loop_controls_slices_and_namespaces_work() {
    let source = "{% set ns = namespace(last='') %}{% for m in messages[::-1] %}\
                  {% if m.role == 'tool' %}{% continue %}{% endif %}{% set ns.last = m.content %}{% break %}{% endfor %}\
                  {{ ns.last.split('</think>')[-1].lstrip('\\n') }}";
    assert_eq!(
        render(
            source,
            &[("user", "a"), ("assistant", "x</think>\nb"), ("tool", "c")]
        )
        .unwrap(),
        "b"
    );
}

#[test]
fn generation_tags_change_nothing() {
    let source = "a{%- generation -%} b {%- endgeneration -%} c{% if true %}d{% endif %}";
    assert_eq!(render(source, &[]).unwrap(), "abcd");
}

#[test]
fn strftime_now_formats_the_date() {
    let date = render("{{ strftime_now('%d %b %Y') }}", &[]).unwrap();
    let parts: Vec<&str> = date.split(' ').collect();
    assert_eq!(parts.len(), 3, "{date}");
    assert!(parts[2].parse::<u32>().unwrap() >= 2024, "{date}");
}

#[test]
fn the_jinja_file_wins_over_the_field() {
    let dir = dir(json!({"chat_template": "field", "bos_token": {"content": "<B>", "lstrip": false}}));
    let load = || {
        ChatTemplate::load(dir.path())
            .unwrap()
            .unwrap()
            .render(&[], false)
            .unwrap()
    };
    assert_eq!(load(), "field");
    std::fs::write(dir.path().join("chat_template.jinja"), "{{ bos_token }}file").unwrap();
    assert_eq!(load(), "<B>file");
}

#[test]
fn of_named_templates_the_default_is_taken() {
    let named = |name: &str| json!({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": name, "template": "d"}]});
    let template = ChatTemplate::load(dir(named("default")).path()).unwrap().unwrap();
    assert_eq!(template.render(&[], false).unwrap(), "d");
    let error = ChatTemplate::load(dir(named("rag")).path())
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with("none of the named templates (tool_use, rag) is called default"),
        "{error}"
    );
}

#[test]
fn no_template_is_no_error_and_a_broken_one_is() {
    assert!(
        ChatTemplate::load(tempfile::tempdir().unwrap().path())
            .unwrap()
            .is_none()
    );
    assert!(
        ChatTemplate::load(dir(json!({"bos_token": null})).path())
            .unwrap()
            .is_none()
    );
    let error = ChatTemplate::load(dir(json!({"chat_template": "{% for %}"})).path())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("tokenizer_config.json: chat_template: syntax error"),
        "{error}"
    );
}
