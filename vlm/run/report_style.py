"""The style sheet of report.html: light and dark, no outside font or file."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --quiet: #656d76; --edge: #d0d7de; --paper: #fff; --panel: #f6f8fa;
  --line: #0b62c4; --pale: #a9cdf5; --good: #1a7f37; --other: #bc4c00; --bad: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --quiet: #9198a1; --edge: #3d444d; --paper: #0d1117;
  --panel: #161b22; --line: #6cb0ff; --pale: #2b4a6f; --good: #3fb950; --other: #f0883e; --bad: #f85149; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 1000px; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid var(--edge); }
table { border-collapse: collapse; margin: .6rem 0; } th { text-align: left; font-weight: 600; }
th, td { padding: .15rem .8rem .15rem 0; vertical-align: top; }
td { overflow-wrap: anywhere; } th, .figure { white-space: nowrap; overflow-wrap: normal; }
.figure { text-align: right; font-variant-numeric: tabular-nums; }
.good, .bad { white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); } .quiet, .missing { color: var(--quiet); }
.problems { border: 1px solid var(--bad); padding: .6rem 1rem; border-radius: 6px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; }
svg { max-width: 100%; font: 11px system-ui, sans-serif; } svg text { fill: var(--quiet); }
svg polyline { fill: none; stroke: var(--line); stroke-width: 1.6; }
svg polyline.pale { stroke: var(--pale); stroke-width: 1; }
svg polyline.other { stroke: var(--other); }
svg polyline.other-pale { stroke: var(--other); stroke-width: 1; opacity: .35; }
svg .mark { stroke: var(--quiet); stroke-width: 1; stroke-dasharray: 4 3; }
svg .mark.skipped, svg .mark.back, svg .mark.hung { stroke: var(--bad); }
svg .mark.back, svg .mark.hung { stroke-width: 2; }
.legend i.line { background: var(--line); } .legend i.other { background: var(--other); }
svg .grid { stroke: var(--edge); stroke-width: .6; }
svg .cell { fill: none; stroke: var(--edge); stroke-width: .5; }
svg .right { fill: var(--line); } svg .wrong { fill: var(--bad); }
svg.matrix text { fill: var(--ink); } svg.matrix text.ink { fill: var(--paper); } .wide { overflow-x: auto; }
.matrix { max-width: none; }
svg.timeline { width: 100%; } svg.timeline .none { fill: var(--panel); } svg.timeline text.name { fill: #fff; }
svg.timeline .unknown { fill: var(--panel); stroke: var(--bad); stroke-dasharray: 3 2; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
.legend i { display: inline-block; width: .9em; height: .9em; border-radius: 2px; margin-right: .35em; }
.timelines figure { margin: 1.1rem 0; } .timelines figcaption { font-weight: 400; }
.timelines .frames { margin: 3px 0; }
.clip { display: flex; gap: 1rem; align-items: center; margin: .7rem 0; }
.clip p { margin: 0; flex: 1; } .frames { flex: none; display: flex; gap: 3px; } .frames img { border-radius: 3px; }
pre { background: var(--panel); padding: .8rem; overflow-x: auto; border-radius: 6px; }
"""
