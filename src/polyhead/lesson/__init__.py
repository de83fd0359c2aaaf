"""The lesson: stacked heads and the weight split, computed step by step until they are the same."""

from polyhead.lesson.lesson import Lesson, LessonStep, lesson

__all__ = ["Lesson", "LessonStep", "lesson"]
