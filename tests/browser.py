"""A page, opened in a real browser."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# axe-core: contrast, names of pictures, order of headings, tables and more
(_AXE,) = importlib.util.find_spec("axe_core_python").submodule_search_locations
ACCESS = f"""<script>{(Path(_AXE) / "axe.min.js").read_text()}</script><script>
window.onload = () => axe.run().then(found => {{
  document.title = JSON.stringify(found.violations.map(
    fault => [fault.id, ...fault.nodes.map(node => node.target.join(" "))]));
}});
</script>"""


def open_in_browser(page, tmp_path, width=1000, *, script, dark=False):
    """What a script makes the page's title, and what the browser wrote to its console."""
    text = page.read_text()  # a page of a run forbids scripts; the copy may run this one
    probed = page.with_name("probed.html")
    probed.write_text(
        text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
        + script
    )
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'browser'}",
        f"--window-size={width},900",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--enable-logging=stderr",
        "--virtual-time-budget=5000",
        "--dump-dom",
        probed.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    seen = json.loads(re.search(r"<title>([\[{].*?[\]}])</title>", done.stdout).group(1))
    return seen, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium on this machine; install it (apt-get install chromium)"
)
