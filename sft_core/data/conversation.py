"""The conversation of a row: its messages and the other variables of the chat template, checked and rendered.

A template may ignore a part of a conversation. Such a part would be dropped silently, so the row is refused. The parts
are the fields of the messages, the columns in COLUMNS, and the keys of the column `chat_template_kwargs`; the template
gets them by these names. LINKS and the name of an answering tool are exempt, as they only link messages to each other.
None (which Arrow adds if another row has the field), "", [] and {} count as no value. Other columns are not part of the
conversation: supervised training reports them as unused, and GRPO's rewards see them. A template may strip text inside
a message (blanks, the reasoning of earlier turns); `sft_core/dataset.py` checks this for trained messages.
Not supported, on purpose: images, sound, videos.
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
    """The conversation as text. `more`: other variables of the template; `prompt`: add the generation prompt.

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
            f"the chat template refuses a conversation of the roles {roles}: {error}; use a chat template that "
            "accepts them (in training --chat_template), or change the messages (--system_prompt '' leaves out the "
            "system prompt)."
        ) from error


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of rendered text, which contains its special tokens already."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], more: dict[str, Any]
) -> list[int]:
    """Token ids of a conversation with generation prompt; raises ValueError if a part is not rendered."""
    check_shown(tokenizer, messages, more)
    return encode(tokenizer, render(tokenizer, messages, more, prompt=True))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """The same; without a chat template (a base model), the token ids of the plain texts."""
    if tokenizer.chat_template is not None:
        return render_prompt(tokenizer, messages, {})
    return tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"]


def text_of(value: Any, column: str) -> str:
    """The plain text of a column.

    Raises:
        ValueError: the value is not text, or it is a conversation written as text.
    """
    if not isinstance(value, str):
        raise ValueError(f"`{column}` must be text and is {type(value).__name__}: convert the column to text.")
    if AS_TEXT.match(value):
        raise ValueError(f"`{column}` is a conversation written as text ({value[:40]!r}): make it a list of messages.")
    return value


def messages_of(value: Any, column: str, wanted: str = "a list of messages") -> list[dict[str, Any]]:
    """The messages of a column, without empty fields. A content that is a list of text parts becomes one text.

    Raises:
        ValueError: the column does not hold messages.
    """
    if not isinstance(value, list) or not value:
        what = "empty" if value in EMPTY else repr(value)[:50]
        raise ValueError(f"`{column}` must be {wanted}, and is {what}: check the data.")
    messages = []
    for message in value:
        if not isinstance(message, dict):
            raise ValueError(f"`{column}` must hold messages with `role` and `content`; it holds {message!r:.80}.")
        fields = without_none(message)
        role, content = fields.get("role"), fields.get("content")
        if role not in ROLES:
            raise ValueError(
                f"unknown role {role!r} in `{column}`: a message needs `content` and a `role` of {', '.join(ROLES)}."
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
    """The messages of a prompt: those of a column, or the column's text as one user message.

    Raises:
        ValueError: the column holds neither, or it ends with an assistant message.
    """
    if isinstance(value, str) and value.strip():
        value = [{"role": "user", "content": text_of(value, column)}]
    messages = messages_of(value, column, "text or a list of messages")
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            f"`{column}` ends with an assistant message, after which nothing can be sampled: remove that message (put "
            "a fixed beginning of all answers into the chat template's generation prompt)."
        )
    return messages


def options_of(row: dict[str, Any], of_all: dict[str, Any] | None) -> dict[str, Any]:
    """The other variables of the chat template, by name: `of_all` for every row, overridden by the row's own.

    Raises:
        ValueError: a value has no form that templates accept, or a name is an argument of apply_chat_template.
    """
    found: dict = {}
    for name in COLUMNS:
        value = row.get(name)
        try:
            found[name] = json.loads(value) if isinstance(value, str) and value else value
        except ValueError as error:
            raise ValueError(
                f"`{name}` must be a list, or a list as JSON text ({error}): correct it, or rename the column if it is "
                "not for the chat template."
            ) from error
    if isinstance(own := found["chat_template_kwargs"] or {}, dict):
        del found["chat_template_kwargs"]
        found = (of_all or {}) | without_none(found) | without_none(own)
    if ours := RESERVED.intersection(found):
        raise ValueError(
            f"chat_template_kwargs may not hold {', '.join(sorted(ours))}, which the program sets itself: remove them."
        )
    return _filled(without_none(found))


def _filled(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value not in EMPTY}


def without_none(value: Any) -> Any:
    """`value` without the None fields that Arrow adds so that all rows have the same fields."""
    if isinstance(value, dict):
        return {key: without_none(part) for key, part in value.items() if part is not None}
    return [without_none(part) for part in value] if isinstance(value, list) else value


def check_shown(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], more: dict[str, Any]) -> None:
    """Raise ValueError if a part of the conversation is not rendered: another value would give the same text."""
    for name, value in more.items():  # some affect only the generation prompt
        changed = render(tokenizer, messages, more | {name: _other(value)}, prompt=True)
        if changed == render(tokenizer, messages, more, prompt=True):
            raise ValueError(
                f"the chat template does not use `{name}` and would leave it out: give a --chat_template that "
                "shows it, or remove it from the data and from --chat_template_kwargs."
            )
    text = render(tokenizer, messages, more)
    for i, message in enumerate(messages):
        links = (*LINKS, "name") if message["role"] == "tool" else LINKS
        for name, value in message.items():
            other = [*messages[:i], message | {name: _other(value)}, *messages[i + 1 :]]
            if name not in links and value != "" and render(tokenizer, other, more) == text:
                raise ValueError(
                    f"the chat template leaves out `{name}` of message {i + 1} (role {message['role']}): "
                    "use a chat template that shows it (in training --chat_template), or leave it out."
                )


def _other(value: Any) -> Any:
    """A value of the same form with other texts and numbers."""
    if isinstance(value, dict):
        return {key: part if key in LINKS else _other(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_other(part) for part in value]
    return f"{value}." if isinstance(value, str) else not value


def with_system(messages: list[dict[str, Any]], system: str, role: str) -> list[dict[str, Any]]:
    """The messages after the system prompt, a message of `role`. A system message in the data is kept instead."""
    first, *rest = messages
    if not system or first["role"] in ("system", "developer"):
        return messages
    if first["role"] == role:
        return [first | {"content": f"{system}\n\n{first['content']}"}, *rest]
    return [{"role": role, "content": system}, *messages]


def shows_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template shows system messages; some templates ignore them, some refuse them."""
    user = [{"role": "user", "content": "."}]
    check_shown(tokenizer, user, {})  # raises for any other fault of the template
    try:
        check_shown(tokenizer, [{"role": "system", "content": "."}, *user], {})
    except ValueError:
        return False
    return True
