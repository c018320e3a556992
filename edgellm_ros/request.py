"""One request on its way through the node: its images, its stream of chunks, its result."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from builtin_interfaces.msg import Time as TimeMessage
from std_msgs.msg import Header

from edgellm import Increment, RequestOutput, SamplingParams
from edgellm_ros import msg
from edgellm_ros.action import Generate
from edgellm_ros.convert import RGB, ImageError, to_rgb
from edgellm_ros.goal import check_goal, to_messages, to_sampling
from edgellm_ros.worker import Job, Outcome

if TYPE_CHECKING:
    from edgellm_ros.vlm_node import VlmNode

Goal = Generate.Goal


class ActiveRequest:
    """Made on the executor's thread; then its parts run on a slot's thread (`_prepare`, `_finish`) and on the engine's
    (`_on_increment`), one after the other."""

    def __init__(
        self,
        node: VlmNode,
        request_id: str,
        goal: Generate.Goal,
        feedback: Callable[[msg.TokenChunk], None] | None,
        on_result: Callable[[msg.GenerateResult], None],
    ) -> None:
        self.job = Job(request_id, self._prepare, self._on_increment, self._finish)
        self.cancelled_by_client = False
        self._node = node
        self._goal = goal
        self._feedback = feedback
        self._on_result = on_result
        self._header = Header(stamp=node.get_clock().now().to_msg())
        self._stamps: list[TimeMessage] = []
        self._age_s = 0.0
        self._age_at = 0.0  # time.monotonic() when _age_s was measured
        self._skipped = 0
        self._next_seq = 0
        self._last_sent = False

    def fail(self, error: str) -> None:
        """End a request that never got into the queue."""
        self._finish(Outcome(error=error))

    def _prepare(self) -> tuple[list[dict[str, Any]], SamplingParams]:
        check_goal(self._goal)
        sampling = to_sampling(self._goal.sampling, self._node.parameter)
        images = self._images()
        return to_messages(self._goal.messages, images, self._node.parameter("system_prompt")), sampling

    def _images(self) -> list[RGB]:
        """The pictures of the goal; notes whose answer it will be."""
        goal, camera = self._goal, self._node.camera
        if goal.image_source == Goal.IMAGE_LATEST:
            frame = camera.newest(goal.max_image_age or self._node.parameter("image.max_age"))
            self._skipped = frame.skipped
            self._note_source([frame.header], frame.age_s)
            return [frame.rgb]
        sources = list(goal.images) + list(goal.compressed_images)
        pictures = []
        for number, source in enumerate(sources):
            try:
                pictures.append(to_rgb(source))
            except ImageError as error:
                raise ImageError(f"image {number + 1} of {len(sources)}: {error}") from error
        if sources:
            headers = [source.header for source in sources]
            self._note_source(headers, camera.age(headers[-1]) if headers[-1].stamp != TimeMessage() else 0.0)
        return pictures

    def _note_source(self, headers: list[Header], age_s: float) -> None:
        self._header, self._stamps = headers[-1], [header.stamp for header in headers]
        self._age_s, self._age_at = age_s, time.monotonic()

    def _on_increment(self, increment: Increment) -> None:
        """Publish at once: this is the engine's thread, right after sampling."""
        ago = time.perf_counter() - increment.sampled_at
        self._send(increment.text, increment.token_ids, time.time_ns() - int(ago * 1e9), increment.finish_reason or "")

    def _send(self, text: str, token_ids: tuple[int, ...], sampled_at_ns: int, finish_reason: str) -> None:
        self._last_sent = bool(finish_reason)
        if not self._goal.stream:
            return
        chunk = msg.TokenChunk(
            header=self._header,
            request_id=self.job.request_id,
            seq=self._next_seq,
            text=text,
            token_ids=token_ids,
            sampled_at=TimeMessage(sec=sampled_at_ns // 10**9, nanosec=sampled_at_ns % 10**9),
            is_last=self._last_sent,
            finish_reason=finish_reason,
        )
        self._next_seq += 1
        self._node.tokens.publish(chunk)
        if self._feedback is not None:
            self._feedback(chunk)

    def _finish(self, outcome: Outcome) -> None:
        result = self._result(outcome)
        if not self._last_sent:  # it ended before the engine had it
            self._send("", (), time.time_ns(), result.finish_reason)
        self._on_result(result)

    def _result(self, outcome: Outcome) -> msg.GenerateResult:
        result = msg.GenerateResult(
            header=self._header,
            request_id=self.job.request_id,
            image_stamps=self._stamps,
            frames_skipped=self._skipped,
        )
        if self._stamps:
            queued_s = outcome.output.timing.queue_s if outcome.output else 0.0
            reached = outcome.engine_at or time.monotonic()
            result.image_age = self._age_s + (reached - self._age_at) + queued_s
        result.timing.queue_s = outcome.waited_s
        if outcome.output is not None:
            _fill(result, outcome.output, outcome)
        elif not outcome.error:
            result.finish_reason = msg.TokenChunk.FINISH_CANCELLED
        result.status = msg.GenerateResult.STATUS_SUCCEEDED
        if outcome.error:
            result.error, result.finish_reason = outcome.error, msg.TokenChunk.FINISH_ERROR
            result.status = msg.GenerateResult.STATUS_ABORTED
        elif result.finish_reason == msg.TokenChunk.FINISH_CANCELLED:
            result.status = msg.GenerateResult.STATUS_CANCELED
            if not self.cancelled_by_client:  # an action goal that nobody cancelled cannot end as cancelled
                result.status = msg.GenerateResult.STATUS_ABORTED
                result.error = "the node was deactivated or stopped before the answer was complete; ask again"
        return result


def _fill(result: msg.GenerateResult, output: RequestOutput, outcome: Outcome) -> None:
    """Text, usage and timings; the library's times count from when it had the input, the message's from acceptance."""
    usage, timing = output.usage, output.timing
    result.text, result.finish_reason = output.text, output.outputs[0].finish_reason
    result.usage = msg.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        reused_tokens=usage.reused_tokens,
    )
    result.timing = msg.Timing(
        queue_s=outcome.waited_s + timing.queue_s,
        prepare_s=outcome.prepare_s,
        vision_s=timing.vision_s,
        prefill_s=timing.prefill_s,
        ttft_s=outcome.waited_s + outcome.prepare_s + timing.ttft_s if usage.completion_tokens else 0.0,
        decode_s=timing.decode_s,
        tokens_per_s=timing.tokens_per_s,
    )
