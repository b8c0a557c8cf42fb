"""The page of launch/chat.py: a person chooses a video, sees frames of it, and talks with the model about it.

It asks nothing of other hosts: no fonts, no scripts, no telemetry, no share. What was uploaded is deleted as soon as
it was looked at; frames and features stay in memory until the person leaves.
"""

from __future__ import annotations

import html
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm.run.chat import ChatModel, Settings
from vlm.run.chat_examples import IMAGE_TYPES, VIDEO_TYPES, Examples
from vlm.run.chat_handlers import Handlers, Page
from vlm.run.chat_style import POLICY, STYLE
from vlm.types import UserError


def gradio_here() -> Any:
    """Gradio, told to call nobody. UserError: it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "0"
    try:
        import gradio
    except ImportError as error:
        raise UserError(
            f"the page needs Gradio 6, which cannot be imported ({error}): pip install 'vlm[chat]' (in this folder: "
            "pip install -e '.[chat]'). In the terminal, --video FILE works without it"
        ) from error
    if int(gradio.__version__.partition(".")[0]) != 6:
        raise UserError(f"the page needs Gradio 6, and {gradio.__version__} is installed: pip install 'vlm[chat]'")
    return gradio


def build(page: Page) -> tuple[Any, Handlers]:
    """(the page as Gradio's Blocks, what its buttons do)."""
    gr = gradio_here()
    handlers = Handlers(page, keep=gr.skip())
    with gr.Blocks(title=page.title, analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(f'<h1 class="vlm-title">{html.escape(page.title)}</h1>', padding=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                file = gr.File(
                    label=_upload_label(page),
                    file_types=[*VIDEO_TYPES, *IMAGE_TYPES],
                    file_count="single",
                    type="filepath",
                    height=150,
                    elem_id="upload",
                    visible=page.model.can_make,
                )
                example = gr.Dropdown(
                    [*page.examples.names],
                    value=None,
                    label="Or choose an example",
                    elem_id="example",
                    visible=bool(page.examples.names),
                )
                frames = gr.HTML(elem_id="frames", padding=False)
                with gr.Accordion("How answers are written", open=False, elem_id="settings"):
                    temperature = gr.Slider(
                        0, 2, value=min(2.0, page.settings.temperature), step=0.05, label="Temperature",
                        info="0: always the likeliest word. Above, words are drawn.", elem_id="temperature",
                    )  # fmt: skip
                    top_p = gr.Slider(
                        0.05, 1, value=page.settings.top_p, step=0.05, label="Top p",
                        info="Draw among the likeliest words of this probability together.", elem_id="top_p",
                    )  # fmt: skip
                    most = gr.Slider(
                        1, max(2048, page.settings.max_new_tokens), value=page.settings.max_new_tokens, step=1,
                        label="Max tokens", info="Length of an answer, at most.", elem_id="max_tokens",
                    )  # fmt: skip
            with gr.Column(scale=3, min_width=400):
                chat = gr.Chatbot(
                    label="Conversation",
                    height=460,
                    render_markdown=False,  # texts may name pictures of other hosts; they come with HTML made harmless
                    allow_tags=False,
                    sanitize_html=True,
                    buttons=[],
                    feedback_options=None,
                    placeholder="Choose a video, then ask about it.",
                    elem_id="chat",
                )
                status = gr.HTML(elem_id="status", padding=False)
                question = gr.Textbox(
                    placeholder="Ask about the video …", show_label=False, lines=1, max_lines=6, submit_btn="Ask",
                    elem_id="question", autofocus=True,
                )  # fmt: skip
                with gr.Row():
                    stop = gr.Button("Stop", size="sm", elem_id="stop")
                    again = gr.Button("Regenerate", size="sm", elem_id="regenerate")
                    clear = gr.Button("Clear", size="sm", elem_id="clear")
        _connect(gr, blocks, handlers, file, example, frames, chat, status, question, (temperature, top_p, most),
                 (stop, again, clear))  # fmt: skip
    return blocks, handlers


def _connect(
    gr: Any, blocks: Any, handlers: Handlers, file: Any, example: Any, frames: Any, chat: Any, status: Any,
    question: Any, settings: tuple[Any, ...], buttons: tuple[Any, ...],
) -> None:  # fmt: skip
    """What happens when. The model answers one person after the other, in the order of asking."""
    stop, again, clear = buttons
    private = {"api_visibility": "private", "show_progress": "hidden"}
    writing = {**private, "concurrency_limit": 1, "concurrency_id": "model", "trigger_mode": "once"}

    # Gradio hands over who asks where a parameter is annotated so, and it is imported only here.
    def with_request(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__func__.__annotations__["request"] = gr.Request  # type: ignore[attr-defined]
        return function

    asking = question.submit(with_request(handlers.ask), [question, *settings], [chat, question, status], **writing)
    regenerating = again.click(with_request(handlers.again), [question, *settings], [chat, question, status], **writing)
    ending = {**private, "cancels": [asking, regenerating]}
    looking = {**ending, "show_progress": "full", "show_progress_on": [frames], "concurrency_limit": 2}
    file.upload(with_request(handlers.upload), file, [file, example, frames, chat, status], **looking)
    example.input(with_request(handlers.choose), example, [frames, chat, status], **looking)
    stop.click(with_request(handlers.stop), None, [chat, question, status], queue=False, **ending)
    chat.clear(with_request(handlers.clear), None, [chat, status], queue=False, **ending)  # its own bin
    clear.click(with_request(handlers.clear), None, [chat, status], queue=False, **ending)
    blocks.unload(with_request(handlers.leave))


def _upload_label(page: Page) -> str:
    limits = page.model.limits
    return f"Upload a video (up to {limits.nbytes / 2**20:,.6g} MB and {limits.seconds:,g} seconds)"


def serve(
    model: ChatModel,
    title: str,
    examples: Examples,
    settings: Settings,
    *,
    host: str,
    port: int,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the page until Ctrl-C. UserError: Gradio is absent, or the port is taken."""
    uploads = Path(tempfile.mkdtemp(prefix="vlm_chat_"))
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    for name in ("NO_PROXY", "no_proxy"):  # Gradio looks whether its own page is there
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost", host]))
    gr = gradio_here()
    from starlette.middleware import Middleware

    page = Page(model=model, title=title, examples=examples, settings=settings, uploads=uploads)
    try:
        blocks, _ = build(page)
        blocks.queue(max_size=64, api_open=False)
        try:
            _, address, _ = blocks.launch(
                server_name=host,
                server_port=port or _free_port(host),
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                allowed_paths=[],
                max_file_size=model.limits.nbytes,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                show_error=False,
                app_kwargs={"middleware": [Middleware(OwnHost)], "docs_url": None, "redoc_url": None},
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
                css=STYLE,
            )
        except OSError as error:
            raise UserError(f"--host {host} --port {port}: the page cannot be served there ({error})") from error
        say(f"the page is at {address} (Ctrl-C ends)")
        if host not in ("127.0.0.1", "localhost", "::1"):
            say(f"note: --host {host}: whoever reaches this machine may use the page; there is no password")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing of what was uploaded stays
        try:
            blocks.block_thread()
        finally:
            blocks.close(verbose=False)
    finally:
        shutil.rmtree(uploads, ignore_errors=True)


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class OwnHost:
    """Tells browsers that the page may ask nothing of any other host."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *POLICY]}
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)
