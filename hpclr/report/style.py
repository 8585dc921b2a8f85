"""How pages and plots look: on light and dark screens and in print, for all kinds of colour vision."""

# Okabe and Ito's colours, which the colour-blind tell apart; in the dark their brighter relatives.
_LIGHT = {
    "paper": "#ffffff", "panel": "#f6f7f9", "ink": "#1b1f24", "quiet": "#5b6470", "line": "#d5dae1", "warn": "#fff3d6",
    "c0": "#0072b2", "c1": "#d55e00", "c2": "#009e73", "c3": "#b8628f", "c4": "#a87400", "c5": "#3b9bd0",
    "c6": "#1b1f24",
}  # fmt: skip
_DARK = {
    "paper": "#14171b", "panel": "#1c2026", "ink": "#e8ebef", "quiet": "#a3adb9", "line": "#363d47", "warn": "#3c2f10",
    "c0": "#4ba3dd", "c1": "#ff8436", "c2": "#2cc79c", "c3": "#e39ac4", "c4": "#f0b429", "c5": "#9ad8ff",
    "c6": "#e8ebef",
}  # fmt: skip
COLOURS = 7
DASHES = (None, "6 3", "2 3", "9 3 2 3")  # after so many colours, another pattern

_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif'

_PLOTS = """
svg text { font: 11px FONT; fill: var(--quiet); }
svg .title { font-size: 14px; font-weight: 600; fill: var(--ink); }
svg .name { font-size: 10.5px; fill: var(--ink); }
svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
svg .grid { stroke: var(--line); stroke-width: 1; fill: none; }
svg .frame { stroke: var(--quiet); stroke-width: 1; fill: none; }
svg .curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
svg .raw { fill: none; stroke-width: 1; stroke-linejoin: round; opacity: 0.4; }
svg .mark { stroke-width: 1; stroke-dasharray: 2 3; fill: none; }
svg .guide { stroke: var(--ink); stroke-width: 1.2; stroke-dasharray: 7 4; fill: none; }
svg .link { stroke-width: 1.2; opacity: 0.6; }
svg .hollow { fill: var(--paper); stroke-width: 2; }
svg .frozen { fill: #ffffff; stroke: #000000; stroke-width: 1; }
svg .over { fill: transparent; }
svg .hatch { stroke: var(--paper); stroke-width: 2; fill: none; }
"""

_PAGE = """
* { box-sizing: border-box; }
html { color-scheme: light dark; }
body { margin: 0 auto; max-width: 1240px; padding: 1.5rem clamp(0.75rem, 3vw, 2rem) 4rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 FONT; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 0.25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 0.75rem; padding-bottom: 0.3rem; border-bottom: 1px solid var(--line); }
p { margin: 0.4rem 0; max-width: 75ch; }
.quiet { color: var(--quiet); }
.warning { background: var(--warn); border-left: 4px solid var(--c1); padding: 0.6rem 1rem; margin: 1rem 0;
  border-radius: 4px; }
.warning ul { margin: 0.3rem 0; padding-left: 1.2rem; }
.scroll { overflow-x: auto; }
.scroll:focus-visible, a:focus-visible, summary:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; min-width: 20rem; }
th, td { padding: 0.28rem 0.9rem 0.28rem 0; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: normal; }
td { white-space: nowrap; }
td.text { white-space: normal; min-width: 9rem; max-width: 20rem; overflow-wrap: anywhere; }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--quiet); min-width: 7rem; max-width: 16rem;
  overflow-wrap: anywhere; }
tbody th { text-align: left; font-weight: 400; color: var(--quiet); white-space: nowrap; position: sticky; left: 0;
  background: var(--paper); }
tbody th.group { color: var(--ink); font-weight: 600; padding-top: 0.9rem; }
tbody th.part { padding-left: 1rem; }
th:first-child { text-align: left; }
#summary { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }
#summary > .scroll { min-width: 0; max-width: 100%; }
#summary > figure { flex: 1 1 24rem; max-width: 36rem; margin-top: 0.5rem; }
details { margin: 0.8rem 0; }
summary { cursor: pointer; color: var(--quiet); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 31rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: 0.75rem; background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  min-width: 0; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: 0.8rem; color: var(--quiet); margin-top: 0.4rem; }
figcaption a { color: var(--c0); margin-right: 0.75rem; white-space: nowrap; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  figure { break-inside: avoid; background: none; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
  figcaption { font-size: 7.5pt; }
  figcaption a { display: none; }
  tbody th { position: static; background: none; }
  .plots { grid-template-columns: 1fr 1fr; }
}
"""


def _declared(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


def _series() -> str:
    numbers = range(COLOURS)
    return "\n".join(f"svg .s{n} {{ stroke: var(--c{n}); }} svg .f{n} {{ fill: var(--c{n}); }}" for n in numbers) + "\n"


_DRAWN = _PLOTS.replace("FONT", _FONT) + _series()
PAGE_CSS = (
    f":root {{ {_declared(_LIGHT)} }}\n"
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_declared(_DARK)} }} }}\n"
    f"{_PAGE.replace('FONT', _FONT)}{_DRAWN}"
)


def svg_css() -> str:
    """The style of a plot on its own, in light colours; without variables, which few programs but browsers know."""
    css = _DRAWN
    for name, value in _LIGHT.items():
        css = css.replace(f"var(--{name})", value)
    return css
