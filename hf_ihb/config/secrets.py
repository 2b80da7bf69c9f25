"""What must not be shown, written down or sent: tokens of services, passwords in URLs."""

import os
import re
from collections.abc import Sequence

from huggingface_hub import get_token
from huggingface_hub.utils import get_stored_tokens

from hf_ihb.errors import RecipeError

_SERVICES = r"api_org|ghp|gho|github_pat|glpat|xox[abp]|sk"
_AWS = r"AKIA[0-9A-Z]{16}"

# Three places, three rates of error that can be borne. What a person types is refused when in doubt;
_TYPED = re.compile(rf"\b(?:hf|{_SERVICES})[_-]\w{{16,}}|\b{_AWS}\b|://[^/\s@]*:[^/\s@]*@")
# a message is masked when in doubt, with whatever stands where a client sends its token;
_TOKEN_IN_MESSAGE = re.compile(r"\bhf_\w{8,}|(?<=Bearer )\S+")
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")
# and files are bytes of any kind, in which names such as hf_ihb_push_x1y2z3 are none.
TOKEN_IN_FILE = re.compile(rf"hf_\w{{20,}}|(?<![A-Za-z0-9])(?:(?:{_SERVICES})[_-]\w{{16,}}|{_AWS})".encode())
_IN_URL = r"[^\s/:@\"'<>\\\x00-\x1f\x7f-\xff]+"
PASSWORD_IN_FILE = re.compile(rf"[a-z][a-z0-9+.-]+://{_IN_URL}:{_IN_URL}@".encode("ascii"))

_NAMES_OF_SECRETS = re.compile(r".*(?:TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_KEY)", re.IGNORECASE)
MIN_SECRET = 8  # characters; anything shorter would be found in every text


def secrets_in_effect(*more: str | None) -> set[str]:
    """The tokens that the Hub's clients would send or have stored, what the environment calls a secret, those given."""
    named = {value for name, value in os.environ.items() if _NAMES_OF_SECRETS.fullmatch(name)}
    return {secret for secret in {get_token(), *get_stored_tokens().values(), *named, *more} if secret}


def is_token_key(name: str) -> bool:
    """Whether a key holds a token, which is used and written nowhere."""
    return name.endswith("_token")


def holds_secret(text: str) -> bool:
    """Whether a text that a person has typed holds a secret."""
    return _TYPED.search(text) is not None


def masked(text: str, *sent: str) -> str:
    """A message without secrets: those in effect, and what looks like one.

    Args:
        text: The message.
        *sent: Tokens that a client has sent, however short.
    """
    known = {*sent, *(secret for secret in secrets_in_effect() if len(secret) >= MIN_SECRET)}
    for secret in sorted(known, key=len, reverse=True):  # one may be a part of another
        text = text.replace(secret, "***")
    return _USER_IN_URL.sub("***", _TOKEN_IN_MESSAGE.sub("***", text))


def masked_key(name: str) -> str:
    """A key as it may be shown, though a secret was typed in its place."""
    return _TYPED.sub("***", name)


def refuse_secrets(argv: Sequence[str]) -> None:
    """Refuses a secret on the command line, but for the one value of a token's key, which is written nowhere.

    Raises:
        RecipeError: If an argument holds one; the message does not.
    """
    name = ""
    for token in argv:
        is_key, value = token.startswith("--"), token
        if is_key:
            key, equals, value = token[2:].partition("=")
            name, value = key.replace("-", "_"), value if equals else key
        if holds_secret(value) and not is_token_key(name):
            where = f" key '{masked_key(name)}':" if name else ""
            raise RecipeError(
                f"command line:{where} expected no secret; set the HF_TOKEN environment variable, or give --hub_token"
            )
        if not is_key or equals:
            name = ""
