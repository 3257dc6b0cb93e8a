"""The dialects as Jinja, for libraries that load a directory of ours: the same ids for text without control strings.

There a conversation is rendered as one string, so typed control strings do become control tokens. A directory that came
with a template keeps that one; these are for vocabularies that came without.
"""

from __future__ import annotations

from abyssal.tokens.bpe import (
    ASSISTANT,
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    CHATML_END,
    CHATML_START,
    END_THINK,
    OUTPUT_BEGIN,
    OUTPUT_END,
    OUTPUTS_BEGIN,
    OUTPUTS_END,
    THINK,
    TOOL_SEP,
    USER,
)

SYSTEM = "messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\\n\\n')"


def own_template(*, chatml: bool = False) -> str:
    """Takes `thinking` ("auto", "on", "off", or a boolean) and `keep_thinking`. An earlier answer loses what stands
    before </think> in it, since clients send back what they were shown.
    """
    if chatml:
        open_system, close_system = f"'{CHATML_START}system\\n' + ", f" + '{CHATML_END}\\n'"
        begin = f"{{%- set said = {SYSTEM} -%}}{{%- if said -%}}"
        begin += f"{{{{- {open_system}said{close_system} -}}}}{{%- endif -%}}"
        user, user_end, assistant = f"{CHATML_START}user\\n", f" + '{CHATML_END}\\n'", f"{CHATML_START}assistant\\n"
        after = "{%- if not loop.last or add_generation_prompt -%}{{- '\\n' -}}{%- endif -%}"
    else:
        begin, user, user_end, assistant, after = f"{{{{- bos_token + ({SYSTEM}) -}}}}", USER, "", ASSISTANT, ""
    return "".join(
        (
            "{%- set keep = keep_thinking | default('last') -%}",
            "{%- set mode = thinking | default('auto') -%}",
            begin,
            "{%- for m in messages if m['role'] != 'system' -%}",
            "{%- if m['role'] == 'user' -%}",
            "{{- '" + user + "' + m['content']" + user_end + " -}}",
            "{%- elif m['role'] == 'assistant' -%}",
            "{{- '" + assistant + "' -}}",
            "{%- if keep == 'all' or (keep == 'last' and loop.last and not add_generation_prompt) -%}",
            "{%- set thought = m['thinking'] if m['thinking'] is string else m['reasoning_content'] -%}",
            "{%- if thought is string -%}{{- '" + THINK + "' + thought + '" + END_THINK + "' -}}{%- endif -%}",
            "{{- m['content'] + eos_token -}}",
            "{%- else -%}",
            "{{- m['content'].split('" + END_THINK + "')[-1] + eos_token -}}",
            "{%- endif -%}",
            after,
            "{%- else -%}",
            "{{- raise_exception('the template knows the roles system, user and assistant, not ' + m['role']) -}}",
            "{%- endif -%}",
            "{%- endfor -%}",
            "{%- if add_generation_prompt -%}",
            "{{- '" + assistant + "' -}}",
            "{%- if mode == 'on' or mode is sameas true -%}{{- '" + THINK + "' -}}",
            "{%- elif mode == 'off' or mode is sameas false -%}{{- '" + END_THINK + "' -}}{%- endif -%}",
            "{%- endif -%}",
        )
    )


def v3_template() -> str:
    """DeepSeek-V3 of December 2024, for a vocabulary with its marks, without <think> and without a template."""
    opened = f"'{ASSISTANT}{CALLS_BEGIN}'"
    call = f"'{CALL_BEGIN}' + call['type'] + '{TOOL_SEP}' + call['function']['name'] + '\\n```json\\n'"
    call += f" + call['function']['arguments'] + '\\n```{CALL_END}'"
    return "".join(
        (
            "{%- set seen = namespace(call=false, output=false, tool=false) -%}",
            f"{{{{- bos_token + ({SYSTEM}) -}}}}",
            "{%- for m in messages if m['role'] != 'system' -%}",
            "{%- if m['role'] == 'user' -%}",
            "{%- set seen.tool = false -%}{{- '" + USER + "' + m['content'] -}}",
            "{%- elif m['role'] == 'tool' -%}",
            "{{- '\\n' if seen.output else '" + OUTPUTS_BEGIN + "' -}}",
            "{{- '" + OUTPUT_BEGIN + "' + m['content'] + '" + OUTPUT_END + "' -}}",
            "{%- set seen.tool = true -%}{%- set seen.output = true -%}",
            "{%- elif m['tool_calls'] -%}",
            "{%- for call in m['tool_calls'] -%}",
            "{%- if seen.call -%}{{- '\\n' + " + call + " + '" + CALLS_END + "' + eos_token -}}",
            "{%- else -%}{{- " + opened + " + " + call + " -}}{%- endif -%}",
            "{%- set seen.call = true -%}",
            "{%- endfor -%}",
            "{%- set seen.tool = false -%}",
            "{%- else -%}",
            "{{- '" + OUTPUTS_END + "' if seen.tool else '" + ASSISTANT + "' -}}",
            "{{- m['content'] + eos_token -}}{%- set seen.tool = false -%}",
            "{%- endif -%}",
            "{%- endfor -%}",
            "{%- if seen.tool -%}{{- '" + OUTPUTS_END + "' -}}",
            "{%- elif add_generation_prompt -%}{{- '" + ASSISTANT + "' -}}{%- endif -%}",
        )
    )
