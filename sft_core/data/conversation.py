"""The conversation of a row: its messages and what else the chat template is given; checked and rendered, for everyone.

A part that has a value and does not show in the rendering would be dropped without a word, so it is refused. Parts are
the fields of the messages (but LINKS and the name of a tool that answers, which say what belongs together), the columns
of COLUMNS, and the keys of the column `chat_template_kwargs`; the template gets them by their names. None (as Arrow
gives every row whose neighbours have the field), "", [] and {} are no values. Other columns are no parts of the
conversation: supervised training leaves them out and says so, in GRPO the rewards see them. What a template strips
inside a text (blanks, the thoughts of earlier turns) is its own affair here; the words that are trained are checked by
`sft_core/dataset.py`. Left out on purpose: images, sound, videos.
"""

import inspect
import json
import re
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
COLUMNS = ("tools", "documents", "chat_template_kwargs", "image", "images", "video", "videos", "audio", "audios")
RESERVED = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - set(COLUMNS)
LINKS = ("role", "type", "id", "tool_call_id")
EMPTY: tuple = (None, "", [], {})
NAME = r"""["'](role|content|from|value)["']\s*:"""
AS_TEXT = re.compile(rf"\s*\[?\s*\{{\s*{NAME}.*{NAME}", re.DOTALL)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    more: dict[str, Any] | None = None,
    prompt: bool = False,
) -> str:
    """The conversation as text; `more`: what else the template gets; `prompt`: up to where the answer begins.

    Raises:
        ValueError: there is no chat template, or it refuses these messages.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template: start from an instruct model, or give one with --chat_template."
        )
    try:
        return tokenizer.apply_chat_template(messages, **(more or {}), tokenize=False, add_generation_prompt=prompt)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja ({error}): check --chat_template.") from error
    except Exception as error:  # Jinja's own errors and the templates' raise_exception
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise ValueError(
            f"the chat template refuses a conversation of the roles {roles}: {error}; give one that takes it, or "
            "change the messages (--system_prompt '' is none)."
        ) from error


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of rendered text, which holds its special tokens already."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], more: dict[str, Any]
) -> list[int]:
    """Token ids of a conversation up to where the assistant's answer begins; all of it shows."""
    check_shown(tokenizer, messages, more)
    return encode(tokenizer, render(tokenizer, messages, more, prompt=True))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """The same, and for a base model, which has no chat template, the plain texts."""
    if tokenizer.chat_template is not None:
        return render_prompt(tokenizer, messages, {})
    return tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"]


def text_of(value: Any, column: str) -> str:
    """The plain text of a column.

    Raises:
        ValueError: it is none, or a conversation that was written as text.
    """
    if not isinstance(value, str):
        raise ValueError(f"`{column}` must be text and is {type(value).__name__}.")
    if AS_TEXT.match(value):
        raise ValueError(f"`{column}` is a conversation written as text ({value[:40]!r}): make it a list of messages.")
    return value


def messages_of(value: Any, column: str, wanted: str = "a list of messages") -> list[dict[str, Any]]:
    """The messages of a column, without empty fields. Parts of text are one text, as where templates take them.

    Raises:
        ValueError: it holds something else.
    """
    if not isinstance(value, list) or not value:
        what = "empty" if value in EMPTY else repr(value)[:50]
        raise ValueError(f"`{column}` must be {wanted}, and is {what}.")
    messages = []
    for message in value:
        if not isinstance(message, dict):
            raise ValueError(f"`{column}` must hold messages with role and content; it holds {message!r}.")
        fields = without_none(message)
        role, content = fields.get("role"), fields.get("content")
        if role not in ROLES:
            raise ValueError(
                f"unknown role {role!r} in `{column}`: a message has `role`, one of {', '.join(ROLES)}, and `content`."
            )
        if isinstance(content, list) and content and all(map(_is_text, content)):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str) and not (content is None and fields.get("tool_calls")):
            raise ValueError(
                f"a message of the {role} in `{column}` is not text but {type(content).__name__}: "
                "give every message one text."
            )
        messages.append(_filled(fields) | {"content": content or ""})
    return messages


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part == {"type": "text", "text": str(part.get("text"))}


def prompt_of(value: Any, column: str) -> list[dict[str, Any]]:
    """The messages that an answer is sampled to: those of a column, or its text as what the user says.

    Raises:
        ValueError: it is neither, or the answer is there already.
    """
    if isinstance(value, str) and value.strip():
        value = [{"role": "user", "content": text_of(value, column)}]
    messages = messages_of(value, column, "text or a list of messages")
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            f"`{column}` ends with what the assistant says, to which there is no next answer: leave that message out "
            "(what every answer begins with belongs into the chat template's generation prompt)."
        )
    return messages


def options_of(row: dict[str, Any], of_all: dict[str, Any] | None) -> dict[str, Any]:
    """What else the chat template gets, by name: for every row `of_all`, and before it what this one says.

    Raises:
        ValueError: it is not in a form that templates take, or would change more than what the template shows.
    """
    found: dict = {}
    for name in COLUMNS:
        value = row.get(name)
        try:
            found[name] = json.loads(value) if isinstance(value, str) and value else value
        except ValueError as error:
            raise ValueError(
                f"`{name}` is neither a list nor one as JSON, as chat templates take it ({error}): "
                "rename the column if it is meant for something else."
            ) from error
    if isinstance(own := found["chat_template_kwargs"] or {}, dict):
        del found["chat_template_kwargs"]
        found = (of_all or {}) | without_none(found) | without_none(own)
    if ours := RESERVED.intersection(found):
        raise ValueError(f"chat_template_kwargs may not hold {', '.join(sorted(ours))}: they are no template's.")
    return _filled(without_none(found))


def _filled(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value not in EMPTY}


def without_none(value: Any) -> Any:
    """`value` without the empty fields that Arrow adds, so that all rows have the same ones."""
    if isinstance(value, dict):
        return {key: without_none(part) for key, part in value.items() if part is not None}
    return [without_none(part) for part in value] if isinstance(value, list) else value


def check_shown(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], more: dict[str, Any]) -> None:
    """Raise ValueError where a part of the conversation does not show: with another value the rendering is the same."""
    for name, value in more.items():  # some matter to the generation prompt alone
        changed = render(tokenizer, messages, more | {name: _other(value)}, prompt=True)
        if changed == render(tokenizer, messages, more, prompt=True):
            raise ValueError(
                f"the chat template knows no {name} and would leave them out: give a --chat_template that "
                "shows them, or take them out of the data."
            )
    text = render(tokenizer, messages, more)
    for i, message in enumerate(messages):
        links = (*LINKS, "name") if message["role"] == "tool" else LINKS
        for name, value in message.items():
            other = [*messages[:i], message | {name: _other(value)}, *messages[i + 1 :]]
            if name not in links and value != "" and render(tokenizer, other, more) == text:
                raise ValueError(
                    f"the chat template leaves out `{name}` of message {i + 1} (role {message['role']}): "
                    "give a --chat_template that shows it, or take it out."
                )


def _other(value: Any) -> Any:
    """A value of the same form whose texts and numbers are others."""
    if isinstance(value, dict):
        return {key: part if key in LINKS else _other(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_other(part) for part in value]
    return f"{value}." if isinstance(value, str) else not value


def with_system(messages: list[dict[str, Any]], system: str, role: str) -> list[dict[str, Any]]:
    """The messages behind the system prompt, as a message of `role`; what the data says in its place stays."""
    first, *rest = messages
    if not system or first["role"] in ("system", "developer"):
        return messages
    if first["role"] == role:
        return [first | {"content": f"{system}\n\n{first['content']}"}, *rest]
    return [{"role": role, "content": system}, *messages]


def shows_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template shows what the system says; some leave it out, some refuse it."""
    user = [{"role": "user", "content": "."}]
    check_shown(tokenizer, user, {})  # another fault of the template is no answer
    try:
        check_shown(tokenizer, [{"role": "system", "content": "."}, *user], {})
    except ValueError:
        return False
    return True
