"""A conversation as an LLM's chat template writes it, whatever the template's habits."""

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
