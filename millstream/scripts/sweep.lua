-- sweep: of the jobs that are due, find those nobody works on; they are to be delivered again by the caller.
--
-- KEYS  1 open  2 ended  3 repack  then per job: state, log, spec, the line it waits in (any name where it is in none)
-- ARGV  1 lease (ms)  2 patience (ms)  3 number of lanes, then per lane: its name and when the oldest delivery that
--       waits in it was submitted (ms, or '' for an empty lane)  then per job: its id
-- Returns {id, lane, 'lost' | 'vanished' | 'due'} per job to deliver, the youngest first (see deliver); each is rescored
-- as it is taken, so that several sweeps at once take different jobs, and a delivery that is lost again is found again.
-- Where a delivery is known to have been made (every queued job's was, and that of a job whose lost lease was seen
-- before), it is gone only when its lane holds nothing older: a backlog is no loss. Nor has one vanished that stands
-- in the line of a limit: a worker takes it from there.
-- flags: allow-oom
-- uses: _ending

local now = server_ms()
local lease, patience, lanes = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local oldest = {}
for i = 1, lanes do
  oldest[ARGV[2 + 2 * i]] = tonumber(ARGV[3 + 2 * i])
end

local function waits(lane, created)
  return oldest[lane] and oldest[lane] <= tonumber(created)
end

local function look(id, state, log, spec, line)
  local score = redis.call('ZSCORE', KEYS[1], id)
  if not score or tonumber(score) > now then
    return nil -- another sweep took it
  end
  local s = redis.call('HMGET', state, 'status', 'lane', 'lease', 'not_before', 'expires', 'attempt', 'seq', 'created',
    'place', 'swept')
  if not s[1] or CLOSED[s[1]] then
    redis.call('ZREM', KEYS[1], id)
    return nil
  end
  assert(s[2] and s[8], 'its state is incomplete')
  if s[1] == 'in_progress' then
    local ends = s[3] or '0'
    local left = tonumber(ends) - now
    if left > lease then -- the server's clock went back: a dead holder's lease must not last until it has caught up
      left = lease
      redis.call('HSET', state, 'lease', now + lease)
    end
    redis.call('ZADD', KEYS[1], now + (left > 0 and left or lease), id)
    if left > 0 or (s[10] == ends and waits(s[2], s[8])) then
      return nil
    end
    redis.call('HSET', state, 'swept', ends)
    return {id, s[2], 'lost', s[8]}
  end
  if s[5] and s[6] == '0' and tonumber(s[5]) <= now then
    local failure = '{"code":"expired","message":"it was not started before its expiry"}'
    redis.call('HSET', state, 'error', failure)
    end_job({id, state, log, spec}, KEYS[1], KEYS[2], KEYS[3], now, s[7] + 1, s[6], 'failed',
      '{"type":"failed","finish_reasons":{},"error":' .. failure .. '}', '')
    return nil
  end
  if s[4] then
    local left = tonumber(s[4]) - now
    redis.call('ZADD', KEYS[1], now + (left > 0 and left or patience), id)
    if left > 0 then
      return nil
    end
    redis.call('HDEL', state, 'not_before', 'wait') -- from here on it waits in its lane, like any other
    return {id, s[2], 'due', s[8]}
  end
  redis.call('ZADD', KEYS[1], now + patience, id)
  if s[9] and redis.call('ZSCORE', line, s[9]) then
    return nil
  end
  return not waits(s[2], s[8]) and {id, s[2], 'vanished', s[8]} or nil
end

local found = {}
for i = 4 + 2 * lanes, #ARGV do
  local k = 4 * (i - 3 - 2 * lanes)
  local done, reply = pcall(look, ARGV[i], KEYS[k], KEYS[k + 1], KEYS[k + 2], KEYS[k + 3])
  if not done then
    redis.call('ZADD', KEYS[1], now + patience, ARGV[i]) -- broken keys must not be looked at in every sweep
  elseif reply then
    found[#found + 1] = reply
  end
end
table.sort(found, function(a, b) return tonumber(a[4]) > tonumber(b[4]) end)
for _, each in ipairs(found) do
  each[4] = nil
end
return found
