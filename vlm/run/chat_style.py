"""How the page of launch/chat.py looks, and what browsers are told of it."""

POLICY = (
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; "
        b"style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
        b"worker-src 'self' blob:; connect-src 'self'; frame-ancestors 'self'; form-action 'self'; base-uri 'self'",
    ),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)

STYLE = """
.gradio-container { width: 100% !important; max-width: 1280px !important; margin: 0 auto !important; }
.vlm-title { font-size: 1.25rem; font-weight: 600; margin: 0.25rem 0 0.5rem; }
.vlm-about { margin: 0.25rem 0 0.5rem; font-size: 0.9rem; overflow-wrap: anywhere; }
.vlm-frames { display: grid; grid-template-columns: repeat(4, 1fr); gap: 0.4rem; }
.vlm-frames figure { margin: 0; }
.vlm-frames img { width: 100%; border-radius: 6px; display: block; }
.vlm-frames figcaption { font-size: 0.75rem; opacity: 0.7; text-align: center; }
.vlm-alert, .vlm-note { padding: 0.5rem 0.75rem; border-radius: 6px; margin: 0.2rem 0; font-size: 0.9rem; }
.vlm-alert { background: #fdecea; color: #8a1c10; border: 1px solid #f3b8b1; }
.vlm-note { background: #eef4fb; color: #1d4368; border: 1px solid #c3d8ee; }
#chat [data-testid] { white-space: pre-wrap; overflow-wrap: anywhere; }
footer { display: none !important; }
"""
