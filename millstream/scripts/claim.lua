-- claim: take the right to run a job, as its newest attempt.
--
-- KEYS  1 state  2 log  3 spec  4 open  5 ended  6 repack
-- ARGV  1 job id  2 token of this delivery  3 lease (ms)
--       4 next: '' to take the job, or the number of the further attempt that the holder of the token begins
-- Returns {'claimed', attempt, last seq, reason, broken, max attempts}
--         {'busy', ms until it may be asked for again}  a lease lives, or the job waits for its time
--         {'closed', status}   it has ended (perhaps right now: attempts used up, or expired before it started)
--         {'fenced'}           next was asked for by a token that is no longer the newest
--         {'unknown'}          no such job
-- From now on the job's holder is TOKEN:ATTEMPT.
-- A lost reply may be retried: the token gets its own attempt and last seq again.
-- An expired lease that nobody took stays valid for its holder. `broken` counts broken and lost attempts only.
-- flags: allow-oom
-- uses: _ending

local job = {ARGV[1], KEYS[1], KEYS[2], KEYS[3]}
local s = redis.call('HMGET', KEYS[1], 'status', 'holder', 'attempt', 'seq', 'lease', 'broken', 'max_attempts', 'expires',
  'not_before', 'reason')
local status, holder, attempt, seq = s[1], s[2], tonumber(s[3]), tonumber(s[4])
local broken, max_attempts = tonumber(s[6]), tonumber(s[7])
if not status then
  return {'unknown'}
end
if CLOSED[status] then
  return {'closed', status}
end
assert(attempt and seq and broken and max_attempts, 'its state is incomplete')

local now = server_ms()
local reason = s[10] or ''
if holder == ARGV[2] .. ':' .. attempt then
  if ARGV[4] == '' or tonumber(ARGV[4]) <= attempt then
    return {'claimed', attempt, seq, reason, broken, max_attempts}
  end
  broken = broken + 1
  reason = 'stream_broken'
elseif ARGV[4] ~= '' then
  return {'fenced'}
elseif status == 'in_progress' then
  local left = tonumber(s[5] or 0) - now
  if left > 0 then
    return {'busy', left}
  end
  broken = broken + 1
  reason = 'worker_lost'
elseif s[9] and tonumber(s[9]) > now then
  return {'busy', tonumber(s[9]) - now}
end

local failure
if s[8] and attempt == 0 and tonumber(s[8]) <= now then
  failure = '{"code":"expired","message":"it was not started before its expiry"}'
elseif broken >= max_attempts then
  failure = '{"code":"attempts_exhausted","message":"' .. broken .. ' attempts were lost or broken, the last one: '
    .. reason .. '"}'
end
if failure then
  redis.call('HSET', KEYS[1], 'error', failure, 'broken', broken)
  end_job(job, KEYS[4], KEYS[5], KEYS[6], now, seq + 1, attempt, 'failed', '{"type":"failed","finish_reasons":{},"error":'
    .. failure .. '}', '')
  return {'closed', 'failed'}
end

attempt = attempt + 1
redis.call('HSET', KEYS[1], 'status', 'in_progress', 'holder', ARGV[2] .. ':' .. attempt, 'attempt', attempt, 'broken', broken,
  'reason', reason, 'lease', now + ARGV[3])
redis.call('HSETNX', KEYS[1], 'started', now)
redis.call('HDEL', KEYS[1], 'not_before', 'wait', 'until', 'line', 'place', 'swept', 'queued')
redis.call('ZADD', KEYS[4], now + ARGV[3], ARGV[1])
return {'claimed', attempt, seq, reason, broken, max_attempts}
