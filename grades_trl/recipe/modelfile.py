"""The modelfile of a GGUF file, by which Ollama runs it as it was trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SYSTEM, USER, REPLY, LAST = "<<system>>", "<<user>>", "<<reply>>", "<<last>>"


def modelfile(files: Sequence[str], tokenizer: PreTrainedTokenizerBase, ends: Sequence[int] = ()) -> str:
    """
    What `ollama create NAME -f Modelfile` reads.

    Args:
        files (`Sequence[str]`): names of the GGUF files beside it: the model, and of a vision-language model the part
            that reads images.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): whose chat template becomes the template. Where Ollama
            cannot express it, the line is left out, with a warning: Ollama then takes a template that it knows.
        ends (`Sequence[int]`, *optional*): ids of the tokens that end an answer beside the end-of-sequence token, by
            the model's generation config: Gemma and Llama 3 end a turn otherwise than a text.
    """
    lines = [f"FROM ./{file}" for file in files]
    template = ollama_template(tokenizer)
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    elif tokenizer.chat_template is not None:
        logger.warning(
            "Ollama cannot express the chat template of this model, so its Modelfile has none: write TEMPLATE there, "
            "or use llama.cpp with --jinja, which takes the template from the GGUF file."
        )
    stops = [tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(list(ends))]
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops) if stop is not None]
    return "\n".join(lines) + "\n"


def ollama_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """
    A chat template in Ollama's language: what stands around the messages of each role.

    It is read off a rendered conversation, and then compared with the original on conversations with and without a
    system message. `None` if they are not the same, as where a template rewrites earlier messages.
    """
    if tokenizer.chat_template is None:
        return None
    system, user, reply, last = (
        {"role": role, "content": content}
        for role, content in (("system", SYSTEM), ("user", USER), ("assistant", REPLY), ("user", LAST))
    )
    try:
        text, asked = render(tokenizer, [user, reply, last]), render(tokenizer, [user])
        start, middle = text.split(USER)
        to_reply, middle = middle.split(REPLY)
        to_last, _ = middle.split(LAST)
        with_system = render(tokenizer, [system, user]).split(SYSTEM)
        prompt = asked.split(USER)[1]
    except (TemplateError, ValueError):  # it refuses one of these conversations, or moves the messages
        return None
    before_user = common_suffix(start, to_last, with_system[-1].split(USER)[0])
    parts = {
        "start": start.removesuffix(before_user),  # a system message that is there by default
        "system": with_system[0],
        "after_system": with_system[-1].split(USER)[0].removesuffix(before_user),
        "user": before_user,
        "prompt": prompt,  # between a question and its answer
        "after_reply": to_last.removesuffix(before_user),
    }
    if to_reply != prompt:
        return None

    def ours(messages: list[dict[str, str]]) -> str:
        has_system = messages[0]["role"] == "system"
        text = parts["system"] + SYSTEM + parts["after_system"] if has_system else parts["start"]
        for message in messages[has_system:]:
            is_user = message["role"] == "user"
            before, after = (parts["user"], parts["prompt"]) if is_user else ("", parts["after_reply"])
            text += before + message["content"] + after
        return text

    for messages in ([user], [user, reply, last], [system, user], [system, user, reply, last]):
        if ours(messages) != render(tokenizer, messages):
            return None
    bos = tokenizer.bos_token or ""
    if bos and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:  # llama.cpp puts it there
        parts |= {name: parts[name].removeprefix(bos) for name in ("start", "system")}
    return (
        f"{{{{ if .System }}}}{parts['system']}{{{{ .System }}}}{parts['after_system']}"
        f"{{{{ else }}}}{parts['start']}{{{{ end }}}}"
        '{{ range .Messages }}{{ if eq .Role "user" }}'
        f"{parts['user']}{{{{ .Content }}}}{parts['prompt']}"
        '{{ else if eq .Role "assistant" }}'
        f"{{{{ .Content }}}}{parts['after_reply']}"
        "{{ end }}{{ end }}"
    )


def common_suffix(*texts: str) -> str:
    shortest = min(texts, key=len)
    ends = (shortest[i:] for i in range(len(shortest) + 1))
    return next(end for end in ends if all(text.endswith(end) for text in texts))


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
