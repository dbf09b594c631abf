"""Chat templates by name, as Jinja in the form that Hugging Face tokenizers keep: for models that bring none, or where another is wanted.

Each writes the turns one after the other, so that what stands before an answer in training is what stands before it when it is asked for.
"""

from __future__ import annotations

_TURNS = (
    "{% for message in messages %}{% if not (tools and loop.first and message['role'] == 'system') %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '<tool_call>\n' + (call['function'] | tojson) + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}"
    "{% if messages and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
    '{{ \'Tools that may be called, as <tool_call>{"name": ..., "arguments": ...}</tool_call>:\' }}'
    "{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
)
CHATML = _TOOLS + _TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
"""OpenAI's ChatML, with tools as JSON: the template of a model from scratch."""
LLAMA3 = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + (message['content'] or '') | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""Llama 3's turns, without tools."""
ALPACA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n### Response:\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ (message['content'] or '') + eos_token + '\n\n' }}"
    "{% else %}{{ raise_exception('there is no place for the role ' + message['role']) }}{% endif %}{% endfor %}"
)
"""Alpaca's headings: plain words, for models whose vocabulary has no marks of turns."""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "alpaca": ALPACA}
"""Name to template."""
