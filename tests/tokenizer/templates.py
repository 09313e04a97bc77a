"""Chat templates in the styles that models come with, written for these tests."""

MISTRAL = """{{ bos_token }}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- '[INST] ' + message['content'] + ' [/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- message['content'] + eos_token -}}
    {%- endif -%}
{%- endfor -%}"""

CHATML = """{% if not messages or messages[0].role != 'system' %}
{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}
{% for message in messages %}
{{ '<|im_start|>' ~ message.role + '\n' + message.content|trim + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{% endif %}"""

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% else %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

# Sets, macros, namespaces, filters, slices, break: what longer templates do.
MODERN = """
{%- macro say(role, text) -%}
<|start|>{{ role|upper }}: {{ text|replace('\t', ' ') }}<|end|>
{%- endmacro -%}
{%- set ns = namespace(system='', count=0) -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set ns.system = messages[0]['content'] | trim -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set rest = messages -%}
{%- endif -%}
{%- for message in rest if message.content is string and message.content|length > 0 -%}
    {%- set ns.count = ns.count + 1 -%}
    {%- if ns.count > 50 -%}{%- break -%}{%- endif -%}
    {%- set content = message.content.split('</think>')[-1].lstrip('\n') -%}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- say('model', content) -}}{%- endgeneration -%}
    {%- else -%}
        {{- bos_token if loop.first else '' -}}
        {{- say(message.role, ns.system ~ content) -}}
        {%- set ns.system = '' -%}
    {%- endif -%}
{%- endfor -%}
{{- {'n': ns.count, 'roles': rest|map(attribute='role')|list|unique|join(',')} | tojson -}}
{%- if add_generation_prompt %}<|start|>MODEL:{% endif -%}"""

ALL = {"mistral": MISTRAL, "chatml": CHATML, "zephyr": ZEPHYR, "modern": MODERN}

# Attempts to leave the sandbox; each would make the file CANARY.
ESCAPES = {
    "lipsum globals": "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "attr filter": "{{ ''|attr('__class__')|attr('__mro__')|last|attr('__subclasses__')() }}",
    "stored format": "{% set f = '{0.__class__.__init__.__globals__}'.format %}{{ f(namespace) }}",
    "format map": "{{ '{a.__class__}'|map('format_map', messages)|list }}{{ 'x'.format_map({}) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "from import": "{% from 'os' import system %}{{ system('touch CANARY') }}",
    "extends": "{% extends '/etc/passwd' %}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "joiner": "{{ joiner.__init__.__globals__.os.system('touch CANARY') }}",
    "namespace": "{{ namespace.__init__.__globals__['__builtins__'] }}",
    "class chain": "{{ ().__class__.__base__.__subclasses__()[0] }}",
    "item chain": "{{ messages['__class__']['__base__'].x }}",
    "macro": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "raise": "{{ raise_exception.__globals__.x }}",
    "range": "{{ range.__globals__.x }}",
    "self": "{{ self._TemplateReference__context.environment.x }}",
    "loop": "{% for x in [1] %}{{ loop._iterable.gi_frame.f_globals.x }}{% endfor %}",
    "mapped": "{{ ([messages]|map(attribute='__class__.__base__')|list|first).x }}",
    "changed": "{{ messages.append({}) }}",
    "namespace name": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "encode": "{{ 'x'.encode().decode() }}",
}

# Programs that take for ever, or all memory.
_DOUBLE = "{% set ns = namespace(x=X) %}{% for i in range(99) %}{% set ns.x = Y %}{% endfor %}"
BOMBS = {
    "nested loops": "{% set r = range(99999) %}" + "{% for i in r %}" * 5 + "{% endfor %}" * 5,
    "loops that write": "{% set r = range(99999) %}{% for i in r %}{% for j in r %}xxxxxxxxxxxx"
                        "{% endfor %}{% endfor %}",
    "filtered loop": "{% set r = range(99999) %}{% for i in r if r|list == r|list %}{% endfor %}",
    "range": "{{ range(10**9)|list }}",
    "repeat": "{{ 'a' * 10**10 }}",
    "repeat left": "{{ 10000000000 * 'a' }}",
    "repeat list": "{{ [0] * 10000000000 }}",
    "power": "{{ 9**9**9**9 }}",
    "float power": "{{ 2.0**99999 }}",
    "digits": _DOUBLE.replace("X", "3").replace("Y", "ns.x * ns.x"),
    "add": _DOUBLE.replace("X", "'ab'").replace("Y", "ns.x + ns.x"),
    "concat": _DOUBLE.replace("X", "'ab'").replace("Y", "ns.x ~ ns.x"),
    "lists": _DOUBLE.replace("X", "[1]").replace("Y", "ns.x + ns.x"),
    "tree": _DOUBLE.replace("X", "[1]").replace("Y", "[ns.x, ns.x]") + "{{ ns.x }}",
    "tuple tree": _DOUBLE.replace("X", "1").replace("Y", "(ns.x, ns.x)") + "{{ ns.x|tojson }}",
    "dict tree": _DOUBLE.replace("X", "1").replace("Y", "{1: ns.x, 2: ns.x}"),
    "dict call tree": _DOUBLE.replace("X", "1").replace("Y", "dict(a=ns.x, b=ns.x)"),
    "map tree": _DOUBLE.replace("X", "1").replace(
        "Y", "[none, none]|map('default', ns.x, true)|list"),
    "spaces tree": "{% set ns = namespace(x=1) %}{% for i in range(99) %}"
                   "{% set ns = namespace(a=[ns, ns]) %}{% endfor %}",
    "replace": _DOUBLE.replace("X", "'aa'").replace("Y", "ns.x|replace('a', ns.x)"),
    "replace method": _DOUBLE.replace("X", "'aa'").replace("Y", "ns.x.replace('a', ns.x)"),
    "replace empty": _DOUBLE.replace("X", "'aa'").replace("Y", "ns.x.replace('', ns.x)"),
    "join": _DOUBLE.replace("X", "'aa'").replace("Y", "ns.x|join(ns.x)"),
    "join method": _DOUBLE.replace("X", "'aa'").replace("Y", "ns.x.join(ns.x)"),
    "set block": _DOUBLE.replace("{% set ns.x = Y %}", "{% set ns.x %}{{ ns.x }}{{ ns.x }}"
                                 "{% endset %}").replace("X", "'aa'"),
    "center": "{{ 'a'|center(1000000000) }}",
    "center method": "{{ 'a'.center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "format": "{{ '%1000000000d'|format(1) }}",
    "format operator": "{{ '%1000000000d' % 1 }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "indent": "{{ [1]|tojson(indent=1000000000) }}",
    "batch": "{{ [1]|batch(1000000000, 'x')|list }}",
    "slice": "{{ [1]|slice(1000000000)|list }}",
    "lipsum": "{{ lipsum(n=1000000000) }}",
    "round": "{{ 1|round(-1000000000) }}",
    "wordwrap": "{{ 'a b'|wordwrap(1, wrapstring='x' * 8000000) }}",
    "macro": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "macro tree": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
                  "{{ m(60) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "endless list": "{{ range(99999)|map('string')|map('upper')|list * 99999 }}",
    "list of lists": "{% set r = [none] * 9999 %}{{ r|map('default', 'a' * 99999, true)|join }}",
    "json": "{% set r = 'a' * 99999 %}{{ ([r] * 99999)|tojson }}",
    "write": "{% set r = 'a' * 99999 %}{% for i in range(99999) %}{{ r }}{% endfor %}",
}  # fmt: skip
