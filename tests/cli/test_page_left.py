"""The page that a conversion leaves beside its report: of what was done or failed, and only where it is wanted."""

import re


def test_a_conversion_writes_its_page(convert, pages, capsys):
    page = convert.bundle / "report.html"
    assert convert("--nopage") == 0 and not page.exists()
    assert convert() == 0 and "report.html" in capsys.readouterr().out  # all is fresh, and the page is missing
    written = page.stat().st_mtime_ns
    assert "<svg" in page.read_text() and "Checks against JAX" in page.read_text()
    assert convert() == 0 and page.stat().st_mtime_ns == written
    assert convert("--config.check.rtol=0.0", "--config.check.atol=0.0", "--config.check.cosine=1.0") == 5
    assert re.search(r'class="bad">FAILED<', page.read_text())
