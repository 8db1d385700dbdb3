"""A conversation as an LLM's chat template writes it, and as tokens, whatever its habits."""

import re
from functools import lru_cache

from transformers import AddedToken

from support.files import UserError

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


# ---- tokens: what is said is text, and never a control token ----

AUDIO_MARK = (
    "\N{OBJECT REPLACEMENT CHARACTER}"  # stands where audio goes in a rendered conversation
)
BREAK = "\N{INTERLINEAR ANNOTATION SEPARATOR}"  # within text that looks like a control token


@lru_cache(maxsize=8)  # by tokenizer: it is asked for every text
def marks_of(tokenizer):
    """{AUDIO_MARK: its token id, BREAK: its token id}, each a token of its own, added if need be.

    Text beside a mark is tokenized as in the middle of a conversation, and the cut is exact. The
    LLM never reads them: whoever tokenizes with them leaves their ids out.
    """
    marks = (AUDIO_MARK, BREAK)
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks])
    return {mark: tokenizer.convert_tokens_to_ids(mark) for mark in marks}


@lru_cache(maxsize=8)
def control_tokens(tokenizer):
    """A pattern that finds what the tokenizer would make a control token of, like <|im_end|>."""
    names = []
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or token.content.startswith("<"):
            names.append(token.content)
    names = sorted({*names, *tokenizer.all_special_tokens} - {AUDIO_MARK, BREAK})
    return re.compile("|".join(re.escape(name) for name in names if len(name) > 1) or r"(?!)")


def as_plain_text(tokenizer, text):
    """The text without marks of ours, and with a BREAK in all that would be a control token."""
    text = text.encode(errors="replace").decode()  # a lone surrogate is no text
    text = text.replace(AUDIO_MARK, " ").replace(BREAK, " ")
    control = control_tokens(tokenizer)
    while control.search(text):
        text = control.sub(lambda found: found[0][0] + BREAK + found[0][1:], text)
    return text


def tokenize_in_context(tokenizer, text):
    """(token ids, the character each begins at) of a text in the middle of a conversation.

    At the start of a string some tokenizers add a space, so an AUDIO_MARK stands before it.
    """
    marks = marks_of(tokenizer)
    marked = AUDIO_MARK + as_plain_text(tokenizer, text)
    encoded = tokenizer(marked, add_special_tokens=False, return_offsets_mapping=True)
    ids, starts = [], []
    n_marks = 0  # so far: each is a character that is not in `text`
    for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"]):
        if token in marks.values():
            n_marks += 1
            continue
        ids.append(token)
        starts.append(start - n_marks)
    return ids, starts


@lru_cache(maxsize=8)
def open_conversation(tokenizer):
    """(text, token ids) of a conversation that an answer may follow."""
    opened = render_chat(tokenizer, [{"role": "user", "content": "a"}])
    return opened, tokenizer(opened, add_special_tokens=False)["input_ids"]


def tokenize_answer(tokenizer, text):
    """The token ids of an answer, as they follow an open conversation.

    There is no AUDIO_MARK before it, after which some tokenizers (Llama 2's, Mistral's) would add a
    space that the LLM does not say.
    """
    marks = marks_of(tokenizer).values()
    answer = space_before_answer(tokenizer) + text
    opened, before = open_conversation(tokenizer)
    rendered = opened + as_plain_text(tokenizer, answer)
    found = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    whole = [i for i in found if i not in marks]
    if whole[: len(before)] == before:
        return whole[len(before) :]
    # the conversation's own end has other tokens where text follows, like Llama 3's two line ends
    return tokenize_in_context(tokenizer, answer)[0]


@lru_cache(maxsize=8)
def end_of_turn(tokenizer):
    """The token the chat template puts after an answer: the first of its special tokens there.

    Where it puts nothing (GLM-4's), the special token that begins the next turn.
    """
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": AUDIO_MARK}]
    marks_of(tokenizer)  # from here on the tokenizer knows AUDIO_MARK
    for conversation in (turns, [*turns, turns[0]]):
        rendered = render_chat(tokenizer, conversation, add_generation_prompt=False)
        after = AUDIO_MARK + rendered.rsplit(AUDIO_MARK, 1)[1]
        ids = tokenizer(after, add_special_tokens=False)["input_ids"][1:]
        for i in ids:
            if i in tokenizer.added_tokens_decoder and i != tokenizer.bos_token_id:
                return i
        if ids and conversation is turns:
            return ids[0]
    return tokenizer.eos_token_id


@lru_cache(maxsize=8)
def space_before_answer(tokenizer):
    """What the chat template puts between the open conversation and an answer: a space, or nothing.

    Of Mistral's it is a space, which belongs to the answer's first token.
    """
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": AUDIO_MARK}]
    before = render_chat(tokenizer, turns, add_generation_prompt=False).split(AUDIO_MARK)[0]
    added = before.removeprefix(render_chat(tokenizer, turns[:1]))
    if not added.isspace():
        return ""
    # some tokenizers put a space there by themselves: two would be one too many
    ids = tokenize_in_context(tokenizer, added + "b")[0]
    turns[1]["content"] = "b"
    rendered = render_chat(tokenizer, turns, add_generation_prompt=False)
    whole = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    places = range(len(whole) - len(ids) + 1)
    return added if any(whole[i : i + len(ids)] == ids for i in places) else ""
