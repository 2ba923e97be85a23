//! `demur eval` when the questions are on the Hub.

use std::fs;

use crate::evals::{eval, place};
use crate::support::{ended, testdata};

/// A Hub with the files that are given by their paths; whatever else is asked for is gated.
fn hub(files: Vec<(&'static str, &'static str)>) -> String {
    use std::io::{BufRead, BufReader, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let base = format!("http://{}/", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut reader = BufReader::new(stream.unwrap());
            let mut lines = Vec::new();
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line).unwrap() <= 2 {
                    break;
                }
                lines.push(line.to_lowercase());
            }
            let path = lines[0].split(' ').nth(1).unwrap().to_owned();
            let token = lines
                .iter()
                .any(|l| l.trim() == "authorization: bearer secret");
            let known = files.iter().find(|(p, _)| p.to_lowercase() == path);
            let (status, body) = match known {
                Some((_, name)) if token => (
                    200,
                    fs::read(testdata().join("parquet").join(name)).unwrap(),
                ),
                _ => (401, Vec::new()),
            };
            let head = format!(
                "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                body.len()
            );
            let stream = reader.get_mut();
            stream
                .write_all(&[head.as_bytes(), &body].concat())
                .unwrap();
        }
    });
    base
}

#[test]
fn suites_come_from_the_hub() {
    let place = place();
    let base = hub(vec![
        (
            "/datasets/openai/gsm8k/resolve/v1/main/test-00000-of-00001.parquet",
            "gsm8k.parquet",
        ),
        (
            "/datasets/openai/gsm8k/resolve/v1/main/train-00000-of-00001.parquet",
            "gsm8k.parquet",
        ),
    ]);
    let fetch = |args: &[&str]| {
        let mut command = place.command([&["eval", "fetch", "--data", "hub"], args].concat());
        command.env("HF_ENDPOINT", &base).env("HF_TOKEN", "secret");
        ended(command.output().unwrap())
    };
    let got = fetch(&["gsm8k", "--revision", "v1"]).succeeded().stdout;
    assert_eq!(got.lines().count(), 2);
    assert!(
        got.contains("hub/openai/gsm8k/main/test-00000-of-00001.parquet"),
        "{got}"
    );
    assert!(
        fetch(&["gsm8k", "--revision", "v1"])
            .succeeded()
            .stdout
            .is_empty()
    );
    let dry = eval(&place, &["gsm8k", "--data", "hub", "--dry-run"])
        .succeeded()
        .stdout;
    assert!(dry.contains("gsm8k: all 9 items"), "{dry}");
    let gated = fetch(&["wildguardtest"]);
    gated.refused(1, &["allenai/wildguardmix is gated", "HF_TOKEN"]);
    fetch(&["xstest"]).refused(1, &["xstest"]);
    let left = fs::read_dir(place.path("hub/allenai/wildguardmix/test")).unwrap();
    assert_eq!(left.count(), 0);
}
