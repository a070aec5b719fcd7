"""A table in the forms it is shown in."""

import io

from sosp_hub.report.grid import Grid
from sosp_hub.report.listing import new_console


def test_the_note_of_a_narrow_table_has_the_width_of_the_terminal():
    note = "n = 3,100; ± is one standard error"
    console = new_console(io.StringIO())
    console.print(Grid("Quality", ("", "loss"), (("dense", "1.0"),), note).terminal())
    lines = console.file.getvalue().splitlines()
    assert lines[-1].strip() == note
