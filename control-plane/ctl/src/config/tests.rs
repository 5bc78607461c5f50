use super::*;
use clap::FromArgMatches as _;

fn parse(words: &str) -> Result<Args, clap::Error> {
    let matches = command().try_get_matches_from(std::iter::once("ctl").chain(words.split(' ')))?;
    Args::from_arg_matches(&matches)
}

fn refused(words: &str) -> String {
    parse(words).expect_err(words).to_string()
}

#[test]
fn the_command_line_is_sound() {
    command().debug_assert();
}

#[test]
fn the_everyday_call_needs_no_name() {
    let Noun::Rollout {
        verb: RolloutVerb::Set(set),
    } = parse("rollout set --canary 5%").unwrap().noun
    else {
        panic!("another verb")
    };
    assert_eq!((set.model, set.canary.get()), (None, 50_000));
    assert!(!set.consent.yes && !set.change.no_wait && !set.change.dry_run);
    assert_eq!(set.expect.expect_revision, None);
}

#[test]
fn every_command_of_the_table_parses() {
    for words in [
        "rollout create demo --stable v1 --canary v2 --canary-share 1%",
        "rollout create --canary v2",
        "rollout get -w",
        "rollout get demo -o json",
        "rollout list -o yaml",
        "rollout set demo --canary 0.5% -y --no-wait --expect-revision 7 --reason why",
        "rollout promote -y --timeout 2m",
        "rollout abort demo --reason repeats --dry-run",
        "worker list",
        "gateway list --control-plane http://cp:8090",
        "model list",
        "generate hi --user u1 --model-version v2 --max-tokens 5 --temperature 0 --seed 3 --header x-region=eu",
        "generate --raw hi --gateway localhost:8080",
        "route test --user u1 --header k=v",
    ] {
        let args = parse(words).unwrap_or_else(|error| panic!("{words}: {error}"));
        let verb: Vec<_> = words
            .split(' ')
            .take(args.noun.name().split(' ').count())
            .collect();
        assert_eq!(args.noun.name(), verb.join(" "));
    }
}

#[test]
fn global_flags_may_stand_behind_the_verb() {
    let args = parse("worker list --timeout 500ms -o yaml").unwrap();
    assert_eq!(
        (args.connection.timeout, args.output),
        (Duration::from_millis(500), Format::Yaml)
    );
    assert_eq!(
        parse("worker list").unwrap().connection.timeout,
        Duration::from_secs(30)
    );
}

#[test]
fn a_bad_value_is_named_with_what_to_write() {
    assert!(refused("rollout set --canary 5").contains("for example 5%"));
    assert!(refused("rollout set --canary 101%").contains("above 100%"));
    assert!(refused("worker list --timeout 5").contains("with its unit"));
    assert!(refused("worker list --timeout 0s").contains("above zero"));
    assert!(refused("route test --header x-region").contains("NAME=VALUE"));
    assert!(refused("route test --header a/b=c").contains("`a/b`"));
    assert!(refused("rollout set").contains("--canary"));
    assert!(refused("worker list -o xml").contains("table, json, yaml"));
}

#[test]
fn abort_has_nothing_to_ask() {
    assert!(parse("rollout abort -y").is_err());
    assert!(parse("rollout promote -y").is_ok());
}

#[test]
fn times_are_read_with_their_unit() {
    let millis = |text| duration(text).map(|time| time.as_millis()).ok();
    assert_eq!(millis("500ms"), Some(500));
    assert_eq!(millis("30s"), Some(30_000));
    assert_eq!(millis("2m"), Some(120_000));
    assert_eq!(millis("1h"), Some(3_600_000));
    for text in [
        "",
        "s",
        "5",
        "-1s",
        "1.5s",
        "99999999999999999999s",
        "18446744073709551615h",
    ] {
        assert_eq!(millis(text), None, "{text}");
    }
}

#[test]
fn help_teaches_by_example() {
    for words in ["--help", "rollout set --help", "generate --help"] {
        let help = refused(words);
        assert!(help.contains("Examples:"), "{help}");
    }
}
