"""Chat templates in the manner of published families, and a renderer as transformers has it.

Written for these tests: the same structure (heads, ends, stripping, thoughts), not their text.
"""

from functools import cache

from jinja2.sandbox import ImmutableSandboxedEnvironment

_PARTS = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
)
_TEXT = (
    "{% set t = m['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text')"
    " | join %}"
)
_CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n"
    + _PARTS.replace("IMAGE", "<|vision_start|><image><|vision_end|>")
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEMPLATES = {  # name -> template, what ends an answer
    "chatml": (_CHATML, "<|im_end|>\n"),
    "vicuna": (
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        + _PARTS.replace("IMAGE", "")
        + " {% else %}{{ m['role'].upper() }}: "
        "{% for p in m['content'] if p['type'] == 'image' %}<image>\n{% endfor %}"
        "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }} {% endfor %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        " ",
    ),
    "idefics": (
        "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
        "{% if m['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
        + _PARTS.replace("IMAGE", "<image>")
        + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
        "<end_of_utterance>\n",
    ),
    "llama": (
        "{{ '<s>' }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        + _TEXT
        + "{% for p in m['content'] if p['type'] == 'image' %}<image>{% endfor %}"
        "{{ t | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
        "{% endif %}",
        "<|eot_id|>",
    ),
    "gemma": (
        "{{ '<s>' }}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set first = messages[0]['content'][0]['text'] + '\n\n' %}"
        "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}<start_of_turn>"
        "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ first if loop.first else '' }}{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] | trim }}{% endif %}"
        "{% endfor %}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>\n",
    ),
    "mistral": (
        "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'system' %}[SYSTEM_PROMPT]"
        + _PARTS.replace("IMAGE", "")
        + "[/SYSTEM_PROMPT]{% elif m['role'] == 'user' %}[INST]"
        + _PARTS.replace("IMAGE", "<image>")
        + "[/INST]{% else %}"
        + _PARTS.replace("IMAGE", "")
        + "</s>{% endif %}{% endfor %}",
        "</s>",
    ),
    "one end for all": (
        "{% for m in messages %}{{ m['role'] }}: "
        + _PARTS.replace("IMAGE", "<image>")
        + "{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% else %}</s>{% endif %}",
        "\n",
    ),
    "thoughts": (  # those of earlier turns are left out, and an empty one is put before the last
        "{% for m in messages %}" + _TEXT + "<|im_start|>{{ m['role'] }}\n"
        "{% for p in m['content'] if p['type'] == 'image' %}<image>{% endfor %}"
        "{% if m['role'] == 'assistant' %}"
        "{% if '</think>' in t %}{% set r = t.split('</think>')[0].split('<think>')[-1].strip() %}"
        "{% set t = t.split('</think>')[-1].lstrip() %}{% else %}{% set r = '' %}{% endif %}"
        "{% if loop.last %}<think>\n{{ r }}\n</think>\n\n{% endif %}{% endif %}"
        "{{ t }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>\n",
    ),
}


def raise_exception(message):
    raise ValueError(message)


@cache
def renderer(template):
    """A function from turns and whether an answer is asked for to text."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    compiled = environment.from_string(template)
    return lambda messages, is_asked: compiled.render(
        messages=messages, add_generation_prompt=is_asked
    )
