// What a person reads: times and durations.

export const moment = (text) => Date.parse(`${text.replace(" ", "T")}Z`);

export function when(text) {
  const then = new Date(moment(text));
  const isToday = then.toDateString() === new Date().toDateString();
  return isToday ? then.toLocaleTimeString() : then.toLocaleString();
}

export function lasting(seconds) {
  const whole = Math.round(seconds);
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}
