"""Terminal chat with a running `vlm_node`: every question is about the camera's newest frame, answers stream.

    python -m edgellm_ros.chat [--node NAME] [--no-image] [--history N] [--ros-args ...]

Ctrl-C stops an answer; Ctrl-D or /quit leaves.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from edgellm.errors import EdgeLLMError
from edgellm_ros import msg
from edgellm_ros.client import Answer, ClientError, Connection, Goal, ModelClient

ANSWER_TIMEOUT_S = 600.0
CANCEL_TIMEOUT_S = 10.0
POLL_S = 0.1
HELP = "Type a question. /reset forgets the conversation, /quit (or Ctrl-D) leaves, Ctrl-C stops an answer."
Message = msg.ChatMessage


@dataclass(frozen=True)
class ChatOptions:
    """How to ask. `history` is how many earlier turns go along with a question, as text."""

    use_image: bool = True
    system_prompt: str = ""
    history: int = 0
    max_tokens: int = 0  # 0: as the node's parameters say


class Chat:
    """A conversation with one node on this terminal."""

    def __init__(self, model: ModelClient, options: ChatOptions) -> None:
        self._model = model
        self._options = options
        self._turns: list[tuple[str, str]] = []  # (question, answer)

    def run(self) -> None:
        """Read questions until the end of the input."""
        if sys.stdin.isatty():
            print(HELP)
        while True:
            try:
                question = input("you> " if sys.stdin.isatty() else "").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if question in ("/quit", "/exit"):
                return
            if question == "/reset":
                self._turns.clear()
                print("(forgotten)")
            elif question.startswith("/"):
                print(HELP)
            elif question:
                self.ask(question)

    def ask(self, question: str) -> None:
        """Ask and print the answer as it comes, then its figures."""
        answer = self._model.ask(
            self._conversation(question),
            image_source=Goal.IMAGE_LATEST if self._options.use_image else Goal.IMAGE_NONE,
            on_text=lambda text: print(text, end="", flush=True),
            sampling=msg.SamplingParams(max_tokens=self._options.max_tokens),
        )
        try:
            result = follow(answer)
        except ClientError as error:
            print(f"error: {error}")
            return
        if result.status == msg.GenerateResult.STATUS_ABORTED:
            print(f"error: {result.error}")
            return
        print(f"\n({figures(answer, result)})")
        self._turns.append((question, result.text))

    def _conversation(self, question: str) -> list[msg.ChatMessage]:
        messages = []
        if self._options.system_prompt:
            messages.append(Message(role=Message.ROLE_SYSTEM, text=self._options.system_prompt))
        for asked, said in self._turns[-self._options.history :] if self._options.history else []:
            messages.append(Message(role=Message.ROLE_USER, text=asked))
            messages.append(Message(role=Message.ROLE_ASSISTANT, text=said))
        return [*messages, Message(role=Message.ROLE_USER, text=question)]


def follow(answer: Answer) -> msg.GenerateResult:
    """Wait for an answer; Ctrl-C cancels it at the node. Raises ClientError."""
    give_up = time.monotonic() + ANSWER_TIMEOUT_S
    try:
        while not answer.done() and time.monotonic() < give_up:
            time.sleep(POLL_S / 10)
        return answer.wait(POLL_S)
    except KeyboardInterrupt:
        answer.cancel()
        return answer.wait(CANCEL_TIMEOUT_S)


def figures(answer: Answer, result: msg.GenerateResult) -> str:
    """Time to first token as seen from here, speed, and the age of the image, in words."""
    parts = []
    if answer.arrivals and result.usage.completion_tokens:
        parts.append(f"first token {1000 * answer.first_token_s:.0f} ms")
        parts.append(f"{result.timing.tokens_per_s:.0f} tokens/s")
    if result.image_stamps:
        parts.append(f"image {1000 * result.image_age:.0f} ms old")
    if result.finish_reason == msg.TokenChunk.FINISH_CANCELLED:
        parts.append("stopped")
    if result.finish_reason == msg.TokenChunk.FINISH_LENGTH:
        parts.append("cut off at max_tokens")
    return ", ".join(parts)


def main(args: Sequence[str] | None = None) -> int:
    """Run the chat; 0, or 1 after a one-line error."""
    parser = argparse.ArgumentParser(prog="chat", description="Terminal chat with a running vlm_node.")
    parser.add_argument("--node", default="vlm_node", help="name of the model node (default: %(default)s)")
    parser.add_argument("--no-image", action="store_true", help="ask without the camera's image")
    parser.add_argument("--system", default="", metavar="TEXT", help="system message")
    parser.add_argument("--history", type=int, default=0, metavar="N", help="earlier turns to send along (default: 0)")
    parser.add_argument("--max-tokens", type=int, default=0, metavar="N", help="longest answer (default: the node's)")
    parser.add_argument("--wait", type=float, default=10.0, metavar="S", help="seconds to wait for the node")
    options, ros_args = parser.parse_known_args(args)
    chat_options = ChatOptions(
        not options.no_image, options.system, max(0, options.history), max(0, options.max_tokens)
    )
    try:
        with Connection("chat", ros_args) as connection:
            model = ModelClient(connection.node, options.node)
            model.wait(options.wait)
            Chat(model, chat_options).run()
    except EdgeLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
