"""One module knows what a secret looks like; what it refuses, masks and finds agree where they must."""

import pytest

from hf_ihb.config.secrets import PASSWORD_IN_FILE, TOKEN_IN_FILE, holds_secret, masked, secrets_in_effect

TOKENS = ["hf_" + "b" * 34, "ghp_" + "a1" * 18, "github_pat_" + "a1" * 11, "glpat-" + "a" * 20, "AKIA" + "A1" * 8]


@pytest.mark.parametrize("token", TOKENS)
def test_what_is_refused_where_it_is_typed_is_found_in_a_file(token):
    assert holds_secret(f"see {token}")
    assert TOKEN_IN_FILE.search(f"see {token}".encode())


def test_a_password_in_a_url_is_known_everywhere():
    url = "https://me:pa55@host/x"
    assert holds_secret(url)
    assert PASSWORD_IN_FILE.search(url.encode())
    assert masked(url) == "https://***@host/x"


def test_a_message_shows_no_secret_of_the_environment_whatever_it_looks_like(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "plaincanary")
    monkeypatch.setenv("SHORT_TOKEN", "the")
    monkeypatch.setenv("LONGER_TOKEN", "plaincanary-and-more")
    assert {"plaincanary", "the"} <= secrets_in_effect()
    assert masked("the plaincanary, plaincanary-and-more and s3nt", "s3nt") == "the ***, *** and ***"


def test_names_of_our_own_folders_are_no_tokens():
    assert TOKEN_IN_FILE.search(b"/tmp/hf_ihb_push_x1y2z3w4/staged") is None
