"""A conversation as an LLM's chat template writes it, and a mark for where audio goes in it."""

from functools import lru_cache

from transformers import AddedToken

from support.files import UserError

# stands where audio goes while a conversation is rendered and tokenized
AUDIO_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


@lru_cache(maxsize=8)
def audio_mark_id(tokenizer):
    """AUDIO_MARK as one token of its own.

    Text beside it is tokenized as in the middle of a conversation, and the cut is exact.
    """
    tokenizer.add_tokens(AddedToken(AUDIO_MARK, normalized=False, special=True))
    return tokenizer.convert_tokens_to_ids(AUDIO_MARK)


def tokenize_in_context(tokenizer, text):
    """(token ids, the character each begins at) of a text in the middle of a conversation.

    At the start of a string some tokenizers add a space.
    """
    audio_mark_id(tokenizer)
    marked = AUDIO_MARK + text.replace(AUDIO_MARK, " ")
    encoded = tokenizer(marked, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start - 1 for start, _ in encoded["offset_mapping"][1:]]
    return encoded["input_ids"][1:], starts


@lru_cache(maxsize=8)
def end_of_turn(tokenizer):
    """The token the chat template puts after an answer: the first of its special tokens there."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": AUDIO_MARK}]
    after = render_chat(tokenizer, turns, add_generation_prompt=False).rsplit(AUDIO_MARK, 1)[1]
    ids = tokenize_in_context(tokenizer, after)[0]
    for i in ids:
        if i in tokenizer.added_tokens_decoder:
            return i
    return ids[0] if ids else tokenizer.eos_token_id


# before a chat template that asks for today's date (Llama 3)
A_DAY = "{% macro strftime_now(format) %}01 Jan 2025{% endmacro %}{{ '' }}"


def render_chat(tokenizer, messages, add_generation_prompt=True):
    """The conversation as the chat template writes it.

    Thinking is off, every day has the same date, and a system turn that the template refuses goes
    before the question.
    """
    try:
        template = tokenizer.get_chat_template()
        rendered = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,
            chat_template=A_DAY + template if "strftime_now" in template else template,
        )
        said = [m["content"].strip() for m in messages if m["role"] != "assistant"]
        why = None if all(text in rendered for text in said) else "it leaves out what is said"
    except Exception as error:  # a template is a program, and may raise anything
        why = f"{type(error).__name__}: {error}"
    if why and len(messages) > 1 and messages[0]["role"] == "system":
        both = messages[0]["content"] + "\n\n" + messages[1]["content"]
        asked = {**messages[1], "content": both}
        return render_chat(tokenizer, [asked, *messages[2:]], add_generation_prompt)
    if why:
        raise UserError(f"the chat template refuses this conversation ({why})")
    return rendered


def flatten(content):
    """What a message says as one text, with AUDIO_MARK where audio goes."""
    if isinstance(content, str):
        return content.encode(errors="replace").decode().replace(AUDIO_MARK, " ")
    pieces = [flatten(c["text"]) if c["type"] == "text" else AUDIO_MARK for c in content]
    return "\n".join(pieces)
