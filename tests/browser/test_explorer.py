"""One explorer in a real JupyterLab, driven by a real browser."""
try: from playwright.sync_api import expect
except ImportError: expect = None          # the `browser` fixture then skips, or fails where DETLEARN_BROWSER=1


def test_slider_redraws(lab, page):
    page.goto(f'{lab}/lab/workspaces/t1/tree/nbs/07_losses/02_focal_loss.ipynb?reset')
    page.locator('.jp-Notebook .jp-CodeCell').first.wait_for()
    # `Idle` shows before the kernel has answered, and a run ordered then is lost: so wait for the kernel itself
    page.evaluate("""async () => { const w = window.jupyterapp.shell.currentWidget; await w.context.ready; await w.sessionContext.ready;
        await w.sessionContext.session.kernel.info; }""")
    page.evaluate("async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    assert not page.get_by_text('Traceback (most recent call last)').count()
    cell = page.locator('.jp-CodeCell', has_text='knobs = explore(show, gamma')
    cell.locator('.noUi-handle').first.wait_for()
    image = cell.locator('img').first
    image.wait_for()
    before = image.get_attribute('src')
    handle = cell.locator('.noUi-handle').first
    handle.scroll_into_view_if_needed(); handle.focus()
    page.keyboard.press('End')
    # ipywidgets replaces the elements: ask the locators again, keep no handles
    expect(image).not_to_have_attribute('src', before, timeout=60_000)
    assert image.evaluate('i => i.complete && i.naturalWidth > 50')
    assert not page.errors, page.errors
