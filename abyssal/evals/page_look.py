"""The report's style sheet and its one small script. Text only: what stands on the page is evals/page.py's.

Colours are CSS variables, so that charts follow light and dark without being drawn twice. System fonts, no network.
"""

from __future__ import annotations

LIGHT = """--bg:#fbfbf9;--panel:#fff;--ink:#18212c;--dim:#667281;--line:#e2e5e8;--grid:#eceef0;--accent:#1f4f96;
--right:#12795f;--wrong:#b3354b;--s0:#2460b4;--s1:#c9661a;--s2:#12876f;--s3:#7d4fa6;--s4:#b3354b;--s5:#7b8794;
color-scheme:light"""
DARK = """--bg:#0d1219;--panel:#131a23;--ink:#e4eaf1;--dim:#8b98a8;--line:#263140;--grid:#1d2733;--accent:#8dbbff;
--right:#4fcbb0;--wrong:#f2788c;--s0:#6ea8ff;--s1:#f0a35e;--s2:#4fcbb0;--s3:#bd97e8;--s4:#f2788c;--s5:#94a1b0;
color-scheme:dark"""

STYLE = (
    f":root{{{LIGHT}}}"
    f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{DARK}}}}}"
    f":root[data-theme=dark]{{{DARK}}}"
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.6 Charter,"Bitstream Charter","Source Serif 4",
 "Iowan Old Style",Georgia,"Noto Serif","Noto Serif CJK SC","Songti SC",serif}
main,header.top{max-width:1120px;margin:0 auto;padding:0 24px}
nav,.sans,table,figure,summary,.tile,.mark,button,.stage-facts,.tip,.key{font-family:system-ui,-apple-system,"Segoe UI",
 Roboto,"Helvetica Neue","Noto Sans","Noto Sans CJK SC",Arial,sans-serif}
header.top{padding-top:44px}
.masthead{display:flex;justify-content:space-between;align-items:center;gap:16px;font-size:13px;color:var(--dim)}
.masthead b{color:var(--accent);letter-spacing:.14em;text-transform:uppercase;font-weight:600}
button{font-size:13px;color:var(--dim);background:none;border:1px solid var(--line);border-radius:99px;padding:5px 13px;
 cursor:pointer}
button:hover,button:focus-visible{color:var(--ink);border-color:var(--dim)}
h1{font-size:clamp(30px,5vw,44px);line-height:1.14;letter-spacing:-.015em;font-weight:600;margin:22px 0 14px;
 max-width:20em;text-wrap:balance}
.lead{font-size:18.5px;line-height:1.62;max-width:44em;margin:0 0 22px}
.lead b{font-weight:600;white-space:nowrap}
nav{display:flex;flex-wrap:wrap;gap:4px 20px;font-size:14px;border-top:1px solid var(--line);
 border-bottom:1px solid var(--line);padding:10px 0;margin-top:26px}
nav a{color:var(--dim);text-decoration:none}nav a:hover{color:var(--accent)}
section{margin:56px 0}
h2{font-size:26px;line-height:1.25;letter-spacing:-.01em;font-weight:600;margin:0 0 6px}
h3{font-size:19px;font-weight:600;margin:44px 0 2px}
p.note{color:var(--dim);max-width:46em;margin:2px 0 18px;font-size:15.5px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:26px 0 0}
.tile{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:14px 16px 12px}
.tile .who{font-size:13px;color:var(--dim);display:flex;align-items:center;gap:7px}
.tile .who i{width:9px;height:9px;border-radius:9px;display:inline-block}
.tile .big{font-size:31px;line-height:1.25;font-weight:600;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.tile .small{font-size:12.5px;color:var(--dim);font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,316px),1fr));gap:14px;margin:14px 0}
figure{margin:0;background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:10px 8px 6px;
 min-width:0}
svg.chart{display:block;width:100%;max-width:460px;height:auto;margin:0 auto;touch-action:pan-y}
svg text{font-size:11px;fill:var(--dim);font-variant-numeric:tabular-nums}
svg .title{font-size:12.5px;font-weight:600;fill:var(--ink)}svg .legend{font-size:11px}
svg .name,svg .value{font-size:12px;fill:var(--ink)}
svg .grid{stroke:var(--grid)}svg .axis{stroke:var(--dim);opacity:.55}
svg .reference{stroke:var(--dim);stroke-dasharray:3 3;opacity:.7}svg .guide{stroke:var(--dim);opacity:.6}
svg .limit{stroke:var(--wrong);stroke-width:1.6;stroke-dasharray:5 3}
svg .line{fill:none;stroke-width:1.9;stroke-linejoin:round;stroke-linecap:round}
svg .raw{fill:none;stroke-width:1;opacity:.28;stroke-linejoin:round}svg .interval{opacity:.3}
figure.wide svg.chart{max-width:640px}figure.full{overflow-x:auto;margin:14px 0}
figure.full svg{display:block;width:100%;height:auto;min-width:760px}figure.full svg.chart{max-width:none}
figure.drawn{padding:0}
td.source{white-space:normal;text-align:left;min-width:24em;color:var(--dim)}td:first-child small{font-weight:400}
svg .span{stroke-width:5;stroke-linecap:round;opacity:.28}
.tip{position:fixed;z-index:9;pointer-events:none;background:var(--ink);color:var(--bg);border-radius:7px;
 padding:6px 10px;font-size:12px;line-height:1.5;font-variant-numeric:tabular-nums;white-space:nowrap;visibility:hidden}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:10px;background:var(--panel);margin:18px 0}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:9px 14px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
tr:last-child td,tr:last-child th{border-bottom:0}
thead th{font-size:12px;font-weight:500;color:var(--dim);line-height:1.3;vertical-align:bottom;white-space:normal;
 min-width:5.2em}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--panel);font-weight:600}
td small{display:block;line-height:1.2;color:var(--dim);font-size:12px}
tr.total td{font-weight:600}
td.wide{width:38%;min-width:190px}td.share{width:13%;min-width:84px}
.bar{display:flex;height:12px;border-radius:3px;overflow:hidden;background:var(--grid);min-width:2px}
.bar span{display:block;height:100%}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:12.5px;color:var(--dim)}
.key i{display:inline-block;width:9px;height:9px;border-radius:2px;margin-right:6px}
.stage-facts{font-size:13px;color:var(--dim);font-variant-numeric:tabular-nums;margin:0 0 4px}
.problem{margin:30px 0 10px}
.problem .ask{font:15px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre-wrap;
 overflow-wrap:anywhere}
.problem .want{font-size:14px;color:var(--dim)}
.traces{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(248px,1fr);gap:12px;overflow-x:auto;
 scroll-snap-type:x proximity;padding-bottom:6px}
.trace{background:var(--panel);border:1px solid var(--line);border-radius:10px;scroll-snap-align:start;display:flex;
 flex-direction:column;min-width:0}
.trace .head{display:flex;justify-content:space-between;gap:8px;padding:9px 13px;border-bottom:1px solid var(--line);
 font:600 13px system-ui,sans-serif}
.mark{font-weight:600;font-size:13px;white-space:nowrap}.mark.right{color:var(--right)}.mark.wrong{color:var(--wrong)}
.trace .body{padding:11px 13px 13px;font:13px/1.55 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",
 "Noto Sans Mono CJK SC",monospace;white-space:pre-wrap;overflow-wrap:anywhere;max-height:27em;overflow-y:auto}
.think{color:var(--dim);border-left:2px solid var(--line);padding-left:10px;margin-bottom:9px}
.at-once{color:var(--dim);font-style:italic;margin-bottom:9px}
.answer{font-weight:700}
.trace .asked{border-bottom:1px solid var(--line);max-height:9em}
details{margin:14px 0}table .bar{margin:3px 0}
details .traces{margin-top:14px}
summary{cursor:pointer;color:var(--dim);font-size:14px}summary:hover{color:var(--ink)}
pre{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:16px 18px;overflow-x:auto;
 font:13px/1.55 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
footer{border-top:1px solid var(--line);color:var(--dim);font-size:14px;padding:18px 0 44px;margin-top:64px}
@media (max-width:560px){main,header.top{padding:0 16px}header.top{padding-top:24px}section{margin:44px 0}
 .lead{font-size:17px}.tiles{grid-template-columns:1fr 1fr}.tile .big{font-size:26px}th,td{padding:8px 11px}
 .traces{grid-auto-columns:84%}}
@media print{button,nav{display:none}.trace .body{max-height:none}figure,.trace{break-inside:avoid}}
"""
)

SCRIPT = """
(() => {
  const root = document.documentElement, button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const label = () => { button.textContent = dark() ? "Light" : "Dark"; };
  try { const kept = localStorage.getItem("abyssal-theme"); if (kept) root.dataset.theme = kept; } catch (e) {}
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("abyssal-theme", root.dataset.theme); } catch (e) {}
    label();
  });
  system.addEventListener("change", label);
  label();

  const tip = document.createElement("div");
  tip.className = "tip";
  document.body.append(tip);
  const show = (value, format) => format === "percent" ? (100 * value).toFixed(1) + " %"
    : Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
  for (const svg of document.querySelectorAll("svg[data-hover]")) {
    const chart = JSON.parse(svg.dataset.hover), guide = svg.querySelector(".guide");
    const hide = () => { tip.style.visibility = "hidden"; guide.setAttribute("visibility", "hidden"); };
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const px = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      if (px < chart.l - 6 || px > chart.r + 6) return hide();
      const place = (value) => chart.lx ? Math.log(value) : value;
      const start = place(chart.x0), span = place(chart.x1) - start || 1;
      const x = start + (px - chart.l) / (chart.r - chart.l) * span;
      const near = (points) => points.reduce((a, b) => Math.abs(place(b[0]) - x) < Math.abs(place(a[0]) - x) ? b : a);
      const at = near(chart.s.flatMap((one) => one.p))[0];
      tip.replaceChildren();
      const line = (text, colour) => {
        const row = document.createElement("div");
        row.textContent = text;
        if (colour !== undefined) {
          const dot = document.createElement("span");
          dot.textContent = "\\u25CF ";
          dot.style.color = `var(--s${colour})`;
          row.prepend(dot);
        }
        tip.append(row);
      };
      line(`${chart.x} ${show(at)}`);
      for (const one of chart.s) {
        const [where, value] = near(one.p);
        line(`${one.n} ${show(value, chart.f)}` + (where === at ? "" : ` (at ${show(where)})`), one.c);
      }
      const gx = chart.l + (place(at) - start) / span * (chart.r - chart.l);
      guide.setAttribute("x1", gx); guide.setAttribute("x2", gx); guide.setAttribute("visibility", "visible");
      const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
      tip.style.left = Math.max(8, left) + "px";
      tip.style.top = Math.max(8, event.clientY - tip.offsetHeight - 12) + "px";
      tip.style.visibility = "visible";
    });
  }
})();
"""
