"""Chat templates as they stand in the files of published models, in words of our own: what each writes is what counts.

Trimming, roles that must alternate, tools in the system text, JSON in tool calls, thinking dropped from earlier turns.
"""

from __future__ import annotations

R1 = """\
{%- set seen = namespace(call=false, output=false, tool=false) -%}
{{- bos_token + (messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\\n\\n')) -}}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}{%- set seen.tool = false -%}{{- '<｜User｜>' + m.content -}}{%- endif -%}
  {%- if m.role == 'assistant' and m.tool_calls -%}
    {%- set seen.tool = false -%}
    {%- for call in m.tool_calls -%}
      {%- if seen.call -%}{{- '\\n' -}}
      {%- else -%}{{- '<｜Assistant｜>' + (m.content or '') + '<｜tool▁calls▁begin｜>' -}}{%- endif -%}
      {%- set seen.call = true -%}
      {{- '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name + '\\n```json\\n' -}}
      {{- call.function.arguments + '\\n```<｜tool▁call▁end｜>' -}}
    {%- endfor -%}
    {{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' -}}
  {%- elif m.role == 'assistant' -%}
    {{- '<｜tool▁outputs▁end｜>' if seen.tool else '<｜Assistant｜>' -}}
    {{- m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' -}}
    {%- set seen.tool = false -%}
  {%- endif -%}
  {%- if m.role == 'tool' -%}
    {{- '' if seen.output else '<｜tool▁outputs▁begin｜>' -}}
    {{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' -}}
    {%- set seen.tool = true -%}{%- set seen.output = true -%}
  {%- endif -%}
{%- endfor -%}
{%- if seen.tool -%}{{- '<｜tool▁outputs▁end｜>' -}}
{%- elif add_generation_prompt -%}{{- '<｜Assistant｜>OPENED' -}}{%- endif -%}
"""
R1_OPENED = R1.replace("OPENED", "<think>\\n")  # since February 2025
R1_CLOSED = R1.replace("OPENED", "")

V31 = """\
{%- set seen = namespace(user=false, tool=false) -%}
{{- bos_token + (messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\\n\\n')) -}}
{%- for m in messages if m.role != 'system' -%}
  {%- if m.role == 'user' -%}
    {{- '<｜User｜>' + m.content -}}{%- set seen.user = true -%}{%- set seen.tool = false -%}
  {%- elif m.role == 'tool' -%}
    {{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' -}}
    {%- set seen.user = false -%}{%- set seen.tool = true -%}
  {%- else -%}
    {{- '<｜Assistant｜></think>' if seen.user else '' -}}
    {{- (m.content or '').split('</think>')[-1] -}}
    {%- for call in m.tool_calls or [] -%}
      {{- '<｜tool▁calls▁begin｜>' if loop.first else '' -}}
      {{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments -}}
      {{- '<｜tool▁call▁end｜>' -}}
      {{- '<｜tool▁calls▁end｜>' if loop.last else '' -}}
    {%- endfor -%}
    {{- '<｜end▁of▁sentence｜>' -}}{%- set seen.user = false -%}{%- set seen.tool = false -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and seen.user and not seen.tool -%}
  {{- '<｜Assistant｜>' + ('<think>' if thinking is defined and thinking else '</think>') -}}
{%- endif -%}
"""

SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a small helper.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

QWEN = """\
{%- if tools or messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + (messages[0].content if messages[0].role == 'system' else 'You are helpful.') }}
    {%- if tools %}
        {{- '\\n\\n# Tools\\n<tools>' }}
        {%- for tool in tools %}
            {{- '\\n' }}{{- tool | tojson }}
        {%- endfor %}
        {{- '\\n</tools>\\nAnswer as <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call>' }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last_query = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query and m.reasoning_content is defined %}
            {{- '<think>\\n' + m.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- m.content }}
        {%- for call in m.tool_calls %}
            {{- '\\n' if m.content or not loop.first }}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system, messages = messages[0]['content'] | trim, messages[1:] %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system + '<|eot_id|>' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}{{- {'output': m.content} | tojson }}
    {%- elif m.tool_calls %}
        {%- if m.tool_calls | length != 1 %}{{- raise_exception('one tool call at a time') }}{%- endif %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + m.tool_calls[0].function.name }}
        {{- '", "parameters": ' }}{{- m.tool_calls[0].function.arguments | tojson }}{{- '}' }}
    {%- else %}
        {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
