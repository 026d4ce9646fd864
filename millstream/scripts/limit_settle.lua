-- limit_settle: requests are over; their streams are free, their tokens are counted as they were.
--
-- KEYS  1 to 11 as _meter says
-- ARGV  1 the meter's name  then per ticket: ticket, tokens it took in all, tokens of its answer
--       ('': unknown, as reserved; tokens -1: it was never asked, all of it comes back, its place before the line, too)
-- Returns {settled, waiting, ms until it is worth asking (-1: nobody waits)}
-- Too much reserved comes back to the slot it was taken from; too little is a debt that counts from now on.
-- A lost reply may be retried: a ticket is settled once.
-- flags: allow-oom
-- uses: _meter

open_meter()
local settled, back = 0, m.streams > 0 or m.tpm > 0 or m.seen > now -- only requests never come back
for i = 2, #ARGV, 3 do
  local ticket, took, answer = ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  local unused = took and took < 0
  if unused then
    call('ZREM', FRONT, ticket)
  end
  local lane, at, reserved = release(ticket)
  if lane then
    settled = settled + 1
    if unused then
      back = true
      count(at, lane, -1, -reserved)
      m.step = 0 -- nor does anybody wait for the step it took: rows of a cancelled batch leave the line one after the other
    elseif took and took < reserved then
      count(at, lane, 0, took - reserved)
    elseif took and took > reserved and at > 0 then
      count(slot, lane, 0, took - reserved)
    end
    if answer then
      read_seldom()
      m.samples = min(m.samples + 1, 1000)
      local weight = max(1 / m.samples, 0.05)
      local off = answer - m.mean
      m.mean = m.mean + weight * off
      m.deviation = m.deviation + weight * (math.abs(off) - m.deviation)
      call('HSET', METER, 'samples', int(m.samples), 'mean', string.format('%.1f', m.mean), 'deviation',
        string.format('%.1f', m.deviation))
    end
  end
end
save_meter()
local waiting = call('ZCARD', LINES[0]) + call('ZCARD', LINES[1])
local wait = -1
if waiting > 0 then
  local at = tonumber(call('ZSCORE', WAITING, ARGV[1]) or now)
  if settled > 0 and back and m.cooling <= now then -- what came back may be enough for the next, in its step
    at = min(at, max(now, math.ceil(min(m.step, now) + spacing(0, math.huge, limits()))))
    call('ZADD', WAITING, at, ARGV[1])
  end
  wait = max(0, at - now)
end
return {settled, waiting, wait}
