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
    let Noun::Rollout { verb } = parse("rollout set --canary 5%").unwrap().noun else {
        panic!("another noun")
    };
    let RolloutVerb::Set(set) = *verb else {
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
        "rollout apply -f plan.yaml --dry-run --expect-revision 7 --reason why",
        "rollout apply -f -",
        "rollout diff -f plan.yaml",
        "rollout lint -f plan.yaml --rate 20/s -o json",
        "rollout step",
        "rollout step 2 --model demo -y",
        "rollout pause demo --reason why",
        "rollout resume",
        "rollout approve --no-wait",
        "rollout retry",
        "rollout undo -y",
        "rollout history --limit 5",
        "rollout explain demo",
        "rollout wait --timeout 6h",
        "rollout list -w",
        "audit --model demo --limit 5",
        "model publish demo v2 --from /m/v2 --warm-prefix hi --warm-prefix @f",
        "model retire demo v1",
        "worker drain w1",
        "gateway override --gateway gw-1 --model demo --to v1 --ttl 1h --reason why",
        "gateway override --gateway gw-1 --model demo --clear",
        "gateway overrides",
        "feedback r-1 --up",
        "feedback r-1 --score 0.3 --comment no",
        "completions bash",
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
        (args.connection.timeout(), args.output),
        (Duration::from_millis(500), Format::Yaml)
    );
    assert_eq!(
        parse("worker list").unwrap().connection.timeout(),
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
    assert!(refused("rollout lint -f a --rate 20").contains("20/s"));
    assert!(refused("rollout lint -f a --rate 0/s").contains("20/s"));
    assert!(refused("feedback r-1").contains("--up"));
    assert!(refused("feedback r-1 --score 2").contains("from 0 to 1"));
    assert!(refused("feedback r-1 --up --down").contains("cannot be used"));
    assert!(refused("gateway override --gateway a --model m").contains("--to"));
    assert!(refused("rollout step 0").contains("1.."));
    assert!(refused("worker list -o xml").contains("table, json, yaml"));
}

#[test]
fn abort_never_asks_and_scripts_may_say_yes_all_the_same() {
    assert!(parse("rollout abort -y").is_ok());
    assert!(parse("rollout promote -y").is_ok());
}

#[test]
fn approvals_of_a_simulation_come_at_once_never_or_after_a_time() {
    for when in ["at-once", "never", "4h"] {
        assert!(parse(&format!("rollout simulate --approvals {when}")).is_ok());
    }
    let wrong = parse("rollout simulate --approvals soon")
        .unwrap_err()
        .to_string();
    assert!(wrong.contains("write at-once, never or a time"), "{wrong}");
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
    for words in [
        "--help",
        "rollout set --help",
        "rollout apply --help",
        "rollout wait --help",
        "gateway override --help",
        "model publish --help",
        "feedback --help",
        "generate --help",
    ] {
        let help = refused(words);
        assert!(help.contains("Examples:"), "{help}");
    }
}
